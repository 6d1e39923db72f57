"""The pocket backbones' data (`data/`) and the recipe that trains them (`recipe/`)."""
