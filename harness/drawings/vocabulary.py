"""The Chinese names of everything in a scene (for MMBench-cn and MME's translation questions)."""

from __future__ import annotations

CHINESE = {
    "circle": "圆形", "square": "正方形", "triangle": "三角形",
    "star": "星形", "cross": "十字形", "ring": "环形",
    "diamond": "菱形", "heart": "心形",
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "orange": "橙色",
    "purple": "紫色", "black": "黑色",
    "cyan": "青色",
    "plain": "纯色", "striped": "条纹", "dotted": "圆点",
    "small": "小", "medium": "中", "large": "大",
    "cat": "猫", "dog": "狗", "fish": "鱼", "bird": "鸟", "cow": "牛", "bee": "蜜蜂",
    "egg": "鸡蛋", "rice": "米饭", "cake": "蛋糕", "milk": "牛奶", "corn": "玉米", "tea": "茶",
    "key": "钥匙", "pen": "钢笔", "cup": "杯子", "saw": "锯子", "fork": "叉子", "lamp": "灯",
    "park": "公园", "zoo": "动物园", "farm": "农场", "shop": "商店", "road": "道路", "lake": "湖泊",
    "animal": "动物", "food": "食物", "tool": "工具", "place": "地点",
}  # fmt: skip
