"""Parts of the tiny random models (`Family.tiny`): their answers mean nothing."""
