"""A small bilingual world, written from a seed: what the quickstart trains on when nobody brings own data.

    python dataset/synthetic.py --out_dir out/world --seed 0

Twenty animals, ten people, twelve places, twelve foods, eight plants and four seasons, in English and in
Chinese. Pretraining texts (stories, descriptions, lists, sums) state the very facts that the chat records ask
for. The file reads from top to bottom: the world's tables, the wordings of questions, one small generator for
each family of chat records, the pretraining texts, the two adapter sets, and the writing of files.

Held out by construction, so that the test asks for understanding rather than memory:
  wordings     a question's body ("do you know what sound {x} makes?") is either for training or for the test;
  numbers      a held-out pair of operands never shares a training text as operands of anything;
  stories      a held-out hero never meets the held-out place in any training text;
  names        names to remember, and unknown things, of the test occur in no training text.
"""

import argparse
import json
import os
import random
import re
import sys
from pathlib import Path

VERSION = "11"  # a folder written by another version is written again

# ------------------------------------------------------------------------------------------ the world: tables

COLOURS = [
    ("red", "红色"), ("yellow", "黄色"), ("green", "绿色"), ("blue", "蓝色"), ("brown", "棕色"),
    ("black", "黑色"), ("white", "白色"), ("grey", "灰色"), ("pink", "粉色"), ("orange", "橙色"),
    ("purple", "紫色"), ("golden", "金色"),
]

# name, where (with its preposition), and what stands there
PLACES = [
    ("village", "村庄", "in the village", "村庄里", "an old well", "一口老井"),
    ("farm", "农场", "on the farm", "农场里", "a tall windmill", "一架高高的风车"),
    ("garden", "花园", "in the garden", "花园里", "a stone bench", "一张石凳"),
    ("river", "小河", "by the river", "小河边", "a wooden bridge", "一座木桥"),
    ("library", "图书馆", "in the library", "图书馆里", "a big round table", "一张大圆桌"),
    ("mill", "磨坊", "at the mill", "磨坊里", "a turning wheel", "一个转动的轮子"),
    ("mountain", "高山", "on the mountain", "高山上", "a hidden cave", "一个隐秘的山洞"),
    ("meadow", "草地", "in the meadow", "草地上", "a crooked fence", "一排歪歪的篱笆"),
    ("beach", "海滩", "on the beach", "海滩上", "a little lighthouse", "一座小灯塔"),
    ("forest", "森林", "in the forest", "森林里", "a hollow tree", "一棵空心树"),
    ("pond", "池塘", "in the pond", "池塘里", "a floating log", "一根漂着的木头"),
    ("market", "市场", "at the market", "市场里", "a bronze bell", "一口铜钟"),
]

# name, sound, home, food, young, legs, colour
ANIMALS = [
    ("cow", "牛", "moo", "哞哞", "farm", "grass", "青草", "calf", "牛犊", 4, "brown"),
    ("dog", "狗", "woof", "汪汪", "village", "bones", "骨头", "puppy", "小狗", 4, "black"),
    ("cat", "猫", "meow", "喵喵", "library", "fish", "鱼", "kitten", "小猫", 4, "orange"),
    ("sheep", "绵羊", "baa", "咩咩", "meadow", "clover", "三叶草", "lamb", "羊羔", 4, "white"),
    ("horse", "马", "neigh", "咴咴", "meadow", "oats", "燕麦", "foal", "马驹", 4, "brown"),
    ("pig", "猪", "oink", "哼哼", "farm", "turnips", "萝卜", "piglet", "小猪", 4, "pink"),
    ("duck", "鸭子", "quack", "嘎嘎", "pond", "weeds", "水草", "duckling", "小鸭", 2, "yellow"),
    ("frog", "青蛙", "ribbit", "呱呱", "pond", "flies", "飞虫", "tadpole", "蝌蚪", 4, "green"),
    ("owl", "猫头鹰", "hoot", "咕咕", "forest", "mice", "小老鼠", "owlet", "小鹰", 2, "brown"),
    ("fox", "狐狸", "yip", "嘤嘤", "forest", "berries", "浆果", "cub", "小狐", 4, "red"),
    ("bear", "熊", "growl", "吼吼", "mountain", "honey", "蜂蜜", "cub", "小熊", 4, "black"),
    ("mouse", "老鼠", "squeak", "吱吱", "mill", "grain", "谷粒", "pup", "小鼠", 4, "grey"),
    ("hen", "母鸡", "cluck", "咯咯", "farm", "corn", "玉米", "chick", "小鸡", 2, "red"),
    ("bee", "蜜蜂", "buzz", "嗡嗡", "garden", "nectar", "花蜜", "grub", "幼虫", 6, "yellow"),
    ("snake", "蛇", "hiss", "嘶嘶", "mountain", "eggs", "鸡蛋", "snakelet", "小蛇", 0, "green"),
    ("squirrel", "松鼠", "chatter", "啾啾", "forest", "acorns", "橡果", "kit", "小松鼠", 4, "red"),
    ("crow", "乌鸦", "caw", "哇哇", "market", "nuts", "坚果", "chick", "雏鸟", 2, "black"),
    ("wolf", "狼", "howl", "嗷嗷", "mountain", "meat", "肉", "pup", "狼崽", 4, "grey"),
    ("donkey", "驴", "bray", "昂昂", "mill", "hay", "干草", "foal", "驴驹", 4, "grey"),
    ("gull", "海鸥", "screech", "欧欧", "beach", "shrimps", "小虾", "chick", "雏鸟", 2, "white"),
]

# name, pronoun, job, home, favourite food, pet; every one of them lives alone in a place
PEOPLE = [
    ("Mia", "米娅", "She", "她", "baker", "面包师", "village", "cake", "cat"),
    ("Tom", "汤姆", "He", "他", "farmer", "农夫", "farm", "cheese", "pig"),
    ("Lily", "莉莉", "She", "她", "gardener", "园丁", "garden", "carrot", "bee"),
    ("Jack", "杰克", "He", "他", "fisher", "渔夫", "river", "rice", "duck"),
    ("Anna", "安娜", "She", "她", "teacher", "老师", "library", "apple", "owl"),
    ("Oscar", "奥斯卡", "He", "他", "miller", "磨坊主", "mill", "bread", "donkey"),
    ("Nora", "诺拉", "She", "她", "painter", "画家", "mountain", "plum", "crow"),
    ("Leo", "里奥", "He", "他", "shepherd", "牧羊人", "meadow", "milk", "sheep"),
    ("Ella", "艾拉", "She", "她", "singer", "歌手", "beach", "lemon", "gull"),
    ("Hugo", "雨果", "He", "他", "woodcutter", "樵夫", "forest", "soup", "dog"),
]

# name, how it stands in a sentence, colour, taste, price in coins
FOODS = [
    ("apple", "苹果", "an apple", "red", "sweet", "甜", 3),
    ("lemon", "柠檬", "a lemon", "yellow", "sour", "酸", 2),
    ("bread", "面包", "bread", "brown", "salty", "咸", 4),
    ("cheese", "奶酪", "cheese", "yellow", "salty", "咸", 7),
    ("honey", "蜂蜜", "honey", "golden", "sweet", "甜", 9),
    ("carrot", "胡萝卜", "a carrot", "orange", "sweet", "甜", 1),
    ("soup", "热汤", "soup", "green", "salty", "咸", 6),
    ("pepper", "辣椒", "a pepper", "red", "spicy", "辣", 5),
    ("rice", "米饭", "rice", "white", "mild", "淡", 8), ("milk", "牛奶", "milk", "white", "mild", "淡", 10),
    ("plum", "李子", "a plum", "purple", "sour", "酸", 11),
    ("cake", "蛋糕", "a cake", "pink", "sweet", "甜", 12),
]

# name, colour, place, season, what it needs
PLANTS = [
    ("rose", "玫瑰", "red", "garden", "summer", "sunlight", "阳光"),
    ("sunflower", "向日葵", "yellow", "farm", "summer", "sunlight", "阳光"),
    ("tulip", "郁金香", "pink", "village", "spring", "rain", "雨水"),
    ("lotus", "荷花", "white", "pond", "summer", "deep water", "深水"),
    ("pine", "松树", "green", "mountain", "winter", "fresh air", "新鲜空气"),
    ("oak", "橡树", "brown", "forest", "autumn", "space", "空间"),
    ("daisy", "雏菊", "white", "meadow", "spring", "sunlight", "阳光"),
    ("bamboo", "竹子", "green", "river", "spring", "rain", "雨水"),
]

# name, weather, what people do, in the order of the year
SEASONS = [
    ("spring", "春天", "warm", "温暖", "plant seeds", "播种"),
    ("summer", "夏天", "hot", "炎热", "swim", "游泳"),
    ("autumn", "秋天", "windy", "多风", "pick apples", "摘苹果"),
    ("winter", "冬天", "cold", "寒冷", "build snowmen", "堆雪人"),
]

OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("tall", "short"), ("fast", "slow"), ("happy", "sad"),
    ("day", "night"),
    ("open", "closed"), ("full", "empty"), ("light", "dark"), ("hard", "soft"), ("wet", "dry"),
    ("old", "young"),
    ("up", "down"), ("left", "right"), ("early", "late"), ("loud", "quiet"), ("clean", "dirty"),
    ("rich", "poor"),
    ("near", "far"), ("thick", "thin"), ("strong", "weak"), ("brave", "afraid"), ("first", "last"),
    ("push", "pull"),
]
OPPOSITES_ZH = [tuple(pair) for pair in (
    "热冷 大小 高矮 快慢 多少 开关 满空 明暗 硬软 湿干 新旧 上下 左右 早晚 长短 净脏 富穷 远近 厚薄 强弱 "
    "前后 推拉 深浅 美丑").split()]

KINDS = {  # category: (English with its article, Chinese with its measure word)
    "animal": ("an animal", "一种动物"), "food": ("a food", "一种食物"), "plant": ("a plant", "一种植物"),
    "place": ("a place", "一个地方"), "season": ("a season", "一个季节"), "colour": ("a colour", "一种颜色"),
}


def with_article(noun):
    """`an owl`, `a fox`."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


# every noun of the world: (English, Chinese, category, English as it stands in a sentence)
NOUNS = ([(r[0], r[1], "animal", with_article(r[0])) for r in ANIMALS] + [(r[0], r[1], "food",
r[2]) for r in FOODS]
         + [(r[0], r[1], "plant", "bamboo" if r[0] == "bamboo" else with_article(r[0])) for r in PLANTS]
         + [(r[0], r[1], "place", with_article(r[0])) for r in PLACES]
         + [(r[0], r[1], "season", r[0]) for r in SEASONS] + [(en, zh, "colour", en) for en, zh in COLOURS])
ZH = {en: zh for en, zh, _, _ in NOUNS}
PHRASE = {en: phrase for en, _, _, phrase in NOUNS}
WHERE = {row[0]: row[2] for row in PLACES}
WHERE_ZH = {row[0]: row[3] for row in PLACES}

# things outside of the world: real ones here, made-up ones come from syllables; a group shares its questions
OUTSIDE = {
    "animals": "penguin whale lion tiger elephant giraffe zebra kangaroo koala panda monkey gorilla camel "
    "crocodile shark octopus jellyfish eagle parrot swan turtle lizard spider ant beetle butterfly moth "
    "snail rabbit deer moose buffalo rhino hippo otter beaver badger hedgehog bat pigeon sparrow peacock "
    "flamingo ostrich lobster salmon walrus dragon unicorn llama hamster ferret leopard cheetah dolphin "
    "goose turkey goat robin lynx",
    "foods": "pizza sushi chocolate spaghetti yoghurt butter coffee tea tofu popcorn ketchup mustard "
    "ginger mango pineapple coconut melon cabbage spinach broccoli pumpkin bacon steak curry jam pasta "
    "salad tuna lettuce cocoa toast ham porridge caramel celery cinnamon vanilla lemonade juice syrup",
    "plants": "cactus orchid palm maple willow violet lavender birch cedar poppy dandelion lilac jasmine "
    "iris aloe peony thistle elm magnolia marigold",
    "people": "Napoleon Einstein Shakespeare Cleopatra Mozart Newton Beethoven Gandhi Picasso Aristotle "
    "Homer Columbus Darwin Edison Galileo Plato Lincoln Caesar Marie Victor Sophie Walter Helen Arthur "
    "Diana Martin",
    "things": "computer telephone volcano rocket piano guitar violin bicycle airplane television robot "
    "submarine microscope camera helicopter satellite galaxy pyramid castle tractor elevator laptop "
    "passport museum stadium hospital airport glacier desert planet magnet battery engine trumpet drum "
    "calculator dictionary",
    "names": "Paris London Tokyo Egypt Brazil Mars Jupiter Berlin Africa Canada Rome Moscow Sydney India "
    "Kenya gravity democracy algebra chess football physics philosophy electricity",
}
OUTSIDE_ZH = {
    "animals": "企鹅 鲸鱼 狮子 老虎 大象 长颈鹿 斑马 袋鼠 考拉 熊猫 猴子 猩猩 骆驼 鳄鱼 鲨鱼 章鱼 水母 "
    "老鹰 鹦鹉 天鹅 乌龟 蜥蜴 蜘蛛 蚂蚁 甲虫 蝴蝶 蜗牛 兔子 麋鹿 水牛 犀牛 河马 水獭 刺猬 蝙蝠 鸽子 麻雀 "
    "孔雀 火烈鸟 鸵鸟 龙虾 恐龙 独角兽 仓鼠 豹子 海豚 大鹅 螃蟹",
    "foods": "披萨 寿司 巧克力 意大利面 酸奶 黄油 咖啡 绿茶 豆腐 爆米花 芥末 生姜 芒果 菠萝 椰子 西瓜 白菜 "
    "菠菜 南瓜 培根 牛排 咖喱 果酱 饺子 火锅 汤圆 粽子 月饼 薯条 汉堡 果汁 土豆 洋葱 葡萄",
    "plants": "仙人掌 兰花 棕榈 枫树 柳树 紫罗兰 薰衣草 白桦 雪松 罂粟 蒲公英 茉莉 牡丹 芦荟 梅花 桂花 "
    "水仙",
    "people": "拿破仑 爱因斯坦 莎士比亚 莫扎特 牛顿 贝多芬 甘地 毕加索 哥伦布 达尔文 爱迪生 伽利略 林肯 "
    "凯撒 孔子 李白 杜甫 秦始皇 诸葛亮 武松",
    "things": "电脑 电话 火山 火箭 钢琴 吉他 小提琴 自行车 飞机 电视 机器人 潜水艇 显微镜 相机 直升机 卫星 "
    "银河 金字塔 城堡 拖拉机 电梯 护照 博物馆 体育馆 医院 机场 冰川 沙漠 磁铁 电池 发动机 计算器 词典 地铁",
    "names": "巴黎 伦敦 东京 埃及 巴西 火星 木星 柏林 非洲 加拿大 罗马 莫斯科 悉尼 印度 北京 上海 重力 "
    "民主 代数 象棋 足球 物理 哲学",
}
ONSETS = "b bl br d dr f fl g gl gr j k kl kr l m n p pl pr qu r s sk sn st t tr v w z zw".split()
VOWELS = "a e i o u oo ee ai ou".split()
CODAS = "b d g k l m n p r s t x z nk rf lt mp sh".split()
ODD_ZH = "咕噜嘟啦叮咚呼哩嘀嗒哐噗嘻呜咪吧喀嗖唧哆嘭"  # characters that make up names of things that are not
ODD_ZH_ENDS = ["兽", "怪", "果", "石", "鸟", "草", "机", "星", "鱼", "糕"]

FIRST_NAMES = """
Alice Bella Carl David Emma Felix Finn George Hannah Henry Ida James Julia Karl Kate Liam Lucy Lucas Maria
Max Nina Noah Olga Oliver Paul Peter Rachel Robert Ruth Sara Simon Sofia Theo Tina Vera Zoe Adam Clara
Ethan Fiona Grace Ian Jane Kevin Laura Milo Nick Pia Rita Sean Toby Uma Yara
""".split()
NAME_STARTS = "Ma La Ti Ro Ne Sa Ka Do Be Vi Lu Ja Mo Fe Ha Zi Ta Re Ni Go".split()
NAME_ENDS = "ra lin to mi sel dan va rek na lo bert dia nis ko ry my tan la ven sha".split()
SURNAMES = "李王张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗"
GIVEN = """
明杰 明华 丽芳 丽华 丽玲 文静 文强 文婷 浩宇 浩洋 欣怡 欣玲 佳怡 佳敏
雪梅 雪兰 鹏飞 鹏宇 晨阳 晨龙 伟强 伟杰 军涛 军强 博涛 燕玲 燕梅
""".split()  # as people bear them, each character in its usual place
PET_NAMES = "Rex Bubbles Socks Coco Biscuit Shadow Lucky Buddy Patch Misty Snowy Ziggy Bruno Pixie".split()

# -------------------------------------------------------------------------------------- wordings of questions

# One block a kind of question (or several that ask alike): "family.kind", then its bodies. (a|b) are
# alternatives, and every combination is a wording. A line with ~ is a clause that a carrier sentence asks.
WORDINGS = """
animals.sound
what (sound|noise) does {x} make?
what does {x} (say|sound like)?
(which|what) (sound|noise|call) (comes from|do you hear from) {x}?
how does {x} sound?
(name|give me) the (sound|noise|call) of {x}.
~ what (sound|noise|call) {x} makes
~ what {x} (says|sounds like)
~ {x}(怎么叫|怎样叫|的叫声是什么|的叫声是怎样的|会发出什么声音|叫起来是什么声音|发出的声音是什么)
animals.home
where does {x} (live|stay|make its home|sleep)?
(in which|in what) place does {x} (live|stay|sleep)?
(what|where) is the home of {x}?
where (can|could|might) I (find|see|meet|visit) {x}?
~ where {x} (lives|stays|sleeps|makes its home)
~ where (I can|we can|one can) (find|see|meet) {x}
~ {x}(住在哪里|住在什么地方|的家在哪里|生活在哪里|在哪里生活|在什么地方生活|的家在什么地方)
animals.food
what does {x} (eat|like to eat|feed on|have for dinner|have for lunch)?
(what|which) food does {x} (eat|like|enjoy|want)?
what (should|can|do) (I|we|you) feed {x}?
~ what {x} (eats|likes to eat|feeds on|has for dinner)
~ (what|which) food {x} (eats|likes|enjoys)
~ {x}(吃什么|喜欢吃什么|平时吃什么|爱吃什么|靠吃什么生活|的食物是什么|一般吃什么)
animals.baby
what (is|do you call|do people call) (the baby|the young|the child) of {x}?
(how|what) do (you|people|we) call the (baby|young) of {x}?
(name|give me the name of) the (baby|young|child) of {x}.
~ what (the baby|the young|the child) of {x} is (called|named)
~ {x}的(宝宝|孩子|幼崽)(叫什么|是什么|怎么称呼|叫什么名字)
animals.legs
how many (legs|feet) (does {x} have|has {x} got|can you count on {x}|are there on {x})?
(on|with) how many (legs|feet) does {x} (walk|stand|go)?
what is the number of (legs|feet) of {x}?
~ how many (legs|feet) {x} (has|walks on|stands on)
~ {x}(有|长着|长了|一共有)(几条腿|多少条腿|几只脚|多少只脚)
animals.colour
(what|which) colour is {x}(| in your world| here)?
what is the colour of {x}(| in your world| here)?
how would you (colour|paint) {x}?
(what|which) colour (should|do|would) I (paint|draw|give) {x}?
~ (what|which) colour {x} (is|has)
~ {x}(是什么颜色|的颜色是什么|是什么颜色的|长什么颜色|身上是什么颜色|是哪种颜色)
animals.about foods.about plants.about
what is {x}?
tell me (about|something about|a little about) {x}.
(describe|explain) {x}(| to me| for me).
what (do you know|can you say|can you tell me|have you heard) about {x}?
(have you heard|did you ever hear) (of|about) {x}?
~ what {x} is(| like)
~ {x}是(什么|什么东西|怎样的)
(介绍一下|说说|讲讲|描述一下|聊聊|说一说){x}(|吧)。
(你听说过|你知道|你了解){x}吗？
people.job
what does {x} do(| for a living| for work| all day)?
what is the (job|work|trade) of {x}?
(what|which) (job|work|trade) does {x} (have|do)?
~ what {x} does(| for a living| for work| all day)
~ (what|which) (job|work|trade) {x} (has|does)
~ {x}(是做什么的|做什么工作|的工作是什么|的职业是什么|靠什么谋生|干什么工作|从事什么职业)
people.home
where does {x} (live|stay|sleep|have a house)?
(in which|in what) place does {x} (live|stay|sleep)?
where (can|could|might) I (find|see|meet|visit) {x}?
(what|where) is the home of {x}?
~ where {x} (lives|stays|sleeps|has a house)
~ where (I can|we can|one can) (find|see|meet) {x}
~ {x}(住在哪里|住在什么地方|的家在哪里|在哪里住|的家在什么地方|家住哪里)
people.likes
what does {x} (like|love|want) to eat?
what is the favourite (food|dish|meal) of {x}?
(what|which) (food|dish|meal) does {x} (like|love|prefer|enjoy)(| best| most)?
~ what {x} (likes|loves|wants) to eat
~ (what|which) (food|dish|meal) {x} (likes|loves|prefers)(| best| most)
~ {x}(最喜欢吃什么|最爱吃什么|喜欢吃什么|爱吃什么|最喜欢的食物是什么|最爱的食物是什么)
people.pet
(what|which) (pet|animal) does {x} (have|keep|own|look after)?
what is the pet of {x}?
(what|which) (pet|animal) (lives with|belongs to) {x}?
does {x} have a pet, and (what|which) is it?
~ (what|which) (pet|animal) {x} (has|keeps|owns|looks after)
~ {x}(养了什么|的宠物是什么|养什么宠物|有什么宠物|家里养了什么|养了什么动物)
people.about
who is {x}?
tell me (about|something about|a little about) {x}.
(describe|introduce) {x}(| to me| for me).
what (do you know|can you say|can you tell me|have you heard) about {x}?
(have you heard|did you ever hear) (of|about) {x}?
~ who {x} is
~ {x}是(谁|什么人|怎样的人)
(介绍一下|说说|讲讲|描述一下|聊聊|说一说){x}(|吧)。
(你听说过|你知道|你认识){x}吗？
people.who
who is the {x}(| here| in your world| around here)?
who works as the {x}(| here| in your world| around here)?
(what|which) (person|neighbour) is the {x}?
what is the name of the {x}(| here| in your world)?
~ who (is|works as) the {x}(| here)
~ (谁是|哪个人是|哪一位是){x}
~ {x}(是谁|是哪一位|叫什么名字|是哪个人)
foods.colour plants.colour
(what|which) colour (is|has) {x}?
what is the colour of {x}(| in your world| here)?
(what|which) colour (should|do|would) I (paint|draw|give) {x}?
~ (what|which) colour {x} (is|has)
~ {x}(是什么颜色|的颜色是什么|是什么颜色的|看上去是什么颜色|是哪种颜色)
foods.taste
(how|what) does {x} taste(| like)?
what (taste|flavour) (has {x}|does {x} have)?
what is the (taste|flavour) of {x}?
is {x} (sweet or sour|salty or sweet|sour or spicy|mild or spicy)?
~ (how|what) {x} tastes like
~ (what|which) (taste|flavour) {x} has
~ {x}(是什么味道|的味道怎么样|吃起来怎么样|尝起来怎么样|是什么味道的|吃起来是什么味道)
foods.price
how (much|many coins) (does {x} cost|do I pay for {x}|do I need for {x}|must I pay for {x})?
what is the (price|cost) of {x}(| here| at the shop)?
what does {x} cost(| here| at the shop)?
~ how (much|many coins) {x} costs
~ what (the price of {x} is|{x} costs|I have to pay for {x})
~ {x}(多少钱|要多少钱|卖多少钱|的价格是多少|需要几枚硬币|要几枚硬币)
plants.home
where does {x} (grow|like to grow|stand|bloom)?
(in which|in what) place does {x} (grow|stand)?
where (can|could|might) I (find|see|pick|visit) {x}?
~ where {x} (grows|stands|likes to grow)
~ where (I can|we can|one can) (find|see|pick) {x}
~ {x}(长在哪里|长在什么地方|在哪里生长|生长在哪里|在什么地方生长|生长在什么地方)
plants.season
when (does|will) {x} look (best|finest|most beautiful)?
(in which|in what) season (is|does) {x} (look best|at its best)?
(what|which) (season|time of year) (suits|belongs to|is best for) {x}?
~ when {x} (looks|is) (best|finest|most beautiful)
~ (in which|in what) season {x} (looks best|is at its best)
~ {x}(什么时候最美|在哪个季节最美|哪个季节最美|什么季节最好看|在什么季节最美|何时最美)
plants.need
what does {x} need(| most| to grow| to live)?
what (should|must|can) (I|we|you) give {x}(| to grow)?
what is (important|good|needed) for {x}?
~ what {x} (needs|wants|must have)(| most| to grow)
~ what (I should|I must|we should) give {x}
~ {x}(需要什么|最需要什么|生长需要什么|要长好需要什么|离不开什么|的生长需要什么)
seasons.weather
(how|what) is the weather (like |)in {x}?
what is {x} like?
how does {x} feel(| outside| here)?
what (kind|sort) of weather (does {x} bring|comes with {x}|do we get in {x})?
~ what the weather is like in {x}
~ how {x} feels(| outside| here)
~ what (kind|sort) of weather {x} (brings|has)
~ {x}(天气怎么样|的天气怎么样|的天气如何|是什么天气|会是什么天气|天气如何)
seasons.next
(what|which season) (comes|follows|is) (right |)after {x}?
(what|which season) (is|comes) next after {x}?
after {x}, (what|which season) (comes|follows)?
~ (what|which season) (comes|follows) (right |)after {x}
~ {x}(之后是什么季节|过后是什么季节|后面是什么季节|的下一个季节是什么|结束以后是什么季节)
seasons.before
(what|which season) (comes|is|was) (right |)before {x}?
before {x}, (what|which season) (comes|is it|was it)?
~ (what|which season) (comes|is|was) (right |)before {x}
~ {x}(之前是什么季节|前面是什么季节|的上一个季节是什么|到来以前是什么季节|来临之前是什么季节)
seasons.doing
what do (people|we|you|they) (do|like to do|love to do) in {x}?
how do (people|we|you|they) spend {x}?
what is there to do in {x}?
~ what (people|we|they) (do|like to do|love to do) in {x}
~ how (people|we|they) spend {x}
~ (人们|大家|村民们){x}(做什么|都做什么|会做什么|喜欢做什么|一般做什么)
places.who
who (lives|stays|sleeps|has a house) {at}?
(what|which) person (lives|stays|sleeps) {at}?
whose (home|house) is {at}?
who (can|could|might) I (meet|visit) {at}?
~ who (lives|stays|sleeps|has a house) {at}
~ (what|which) person (lives|stays|sleeps) {at}
~ (谁住在{at}|{at}住着谁|住在{at}的是谁|{at}住的是谁|什么人住在{at}|{at}住着什么人)
places.thing
what (is|stands|can be found|is there) {at}?
what (can|could|might) (I|we|you) (see|find|visit) {at}?
~ what (is|stands|can be found) {at}
~ what (I|we|you) can (see|find) {at}
~ {at}(有什么|能看到什么|能找到什么|可以看到什么|都有什么|有什么东西)
addition.sum
what (is|makes) {a} plus {b}?
what is {a} \\+ {b}?
how much (is|are) {a} (plus|and) {b}?
(add|sum up) {a} and {b}(| for me).
(calculate|compute|work out) {a} (plus|\\+) {b}(| for me).
what (is|do you get for|do you get from) the sum of {a} and {b}?
what do {a} and {b} (make|add up to|come to)(| together)?
{a} (plus|\\+) {b} (is|makes|equals) what?
I have {a} (coins|nuts|books|eggs) and get {b} more. How many (are there|do I have)(| now)?
~ (what|how much) {a} plus {b} (is|makes)
~ what (the sum of {a} and {b} is|{a} and {b} add up to)
~ {a}(加|加上|\\+){b}(等于多少|是多少|等于几|得多少)
(计算|算一下|算算|求){a}(加|加上|\\+){b}。
{a}(和|与){b}(的和是多少|加起来是多少|一共是多少)？
我有{a}(枚硬币，又得到{b}枚|个苹果，又得到{b}个|本书，又得到{b}本)，(一共有多少|现在有多少)？
subtraction.difference
what (is|makes) {a} minus {b}?
what is {a} - {b}?
how much is {a} (minus|less) {b}?
(take|subtract) {b} from {a}(| for me).
(calculate|compute|work out) {a} (minus|-) {b}(| for me).
what (is|do you get for) the difference of {a} and {b}?
what is left when {b} is (taken|subtracted) from {a}?
{a} (minus|-) {b} (is|makes|equals) what?
I have {a} (coins|nuts|books|eggs) and give away {b}. How many (are left|do I have left|remain)?
~ (what|how much) {a} minus {b} (is|makes)
~ what (the difference of {a} and {b} is|is left of {a} without {b})
~ {a}(减|减去|-){b}(等于多少|是多少|等于几|得多少)
(计算|算一下|算算|求){a}(减|减去|-){b}。
{a}(和|与){b}(的差是多少|相差多少|差多少)？
我有{a}(枚硬币，给了别人{b}枚|个苹果，给了别人{b}个|本书，给了别人{b}本)，(还剩多少|现在剩多少)？
comparing.larger
which (number |)is (larger|bigger|greater|higher), {a} or {b}?
(what|which) is the (larger|bigger|greater|higher) (number|one)(| here), {a} or {b}?
{a} or {b}: which (number |one |)is (larger|bigger|greater|higher)?
compare {a} (and|with) {b}: which (one |)is (larger|bigger|greater)?
~ which (number |)is (larger|bigger|greater|higher), {a} or {b}
~ {a}(和|与|跟){b}(哪个大|哪个更大|哪个数大|哪个比较大|谁大|谁更大)
{a}(还是|或者){b}(大|更大|比较大)？
comparing.smaller
which (number |)is (smaller|lower|less), {a} or {b}?
(what|which) is the (smaller|lower|lesser) (number|one)(| here), {a} or {b}?
{a} or {b}: which (number |one |)is (smaller|lower|less)?
compare {a} (and|with) {b}: which (one |)is (smaller|lower|less)?
~ which (number |)is (smaller|lower|less), {a} or {b}
~ {a}(和|与|跟){b}(哪个小|哪个更小|哪个数小|哪个比较小|谁小|谁更小)
{a}(还是|或者){b}(小|更小|比较小)？
sorting.up
(sort|order|arrange) (these numbers |the numbers |)from (small to large|smallest to largest): {l}
(sort|order|arrange) (these numbers |the numbers |)from low to high: {l}
(sort|order|arrange|put) {l} from (small to large|smallest to largest|low to high).
(put|write|bring) {l} (in order|in rising order), (smallest|lowest) first.
(sort|order|arrange) {l}, (smallest|lowest) first.
(把|将|请把){l}(从小到大|由小到大|按从小到大的顺序)(排列|排序|排好|排一下|排一排)。
(从小到大|由小到大|按从小到大的顺序)(排列|排序|排好|排一下|排一排)：{l}
sorting.down
(sort|order|arrange) (these numbers |the numbers |)from (large to small|largest to smallest): {l}
(sort|order|arrange) (these numbers |the numbers |)from high to low: {l}
(sort|order|arrange|put) {l} from (large to small|largest to smallest|high to low).
(put|write|bring) {l} (in order|in falling order), (largest|highest) first.
(sort|order|arrange) {l}, (largest|highest) first.
(把|将|请把){l}(从大到小|由大到小|按从大到小的顺序)(排列|排序|排好|排一下|排一排)。
(从大到小|由大到小|按从大到小的顺序)(排列|排序|排好|排一下|排一排)：{l}
counting.items
how many (words|things|items) (are|do you see|can you count) (here|in this list|in the list): {l}?
count (the words|the things|the items|what is) (here|in this list|in the list): {l}
how long is (this|the) list: {l}?
{l}: how many (words|things|items) (are these|is that|are there)?
(数一数|数数|请数一数|帮我数数)(有几个词|有多少个词|有几样东西|一共几个)：{l}
(这里|这个列表里|下面|列表里)(有几个词|有多少个词|有几样东西|一共有几个)：{l}？
{l}，(一共几个|这是几个词|这里有几个词|总共有多少个)？
counting.times
how (often|many times) does {w} (appear|come|stand) in (this list|the list): {l}?
how (often|many times) (do you see|can you find) {w} in (this list|the list): {l}?
count (how often|how many times) {w} (appears|comes|is named|stands) in (this list|the list): {l}
how many times is {w} (named|written) (here|in this list|in the list): {l}?
(数一数|数数|请数一数|帮我数数){w}出现了(几次|多少次)：{l}
{w}在(这里|这个列表里|列表里)(出现了几次|出现了多少次|出现几次|有几个)：{l}？
opposites.word
what is the (opposite|reverse|contrary) of {x}?
(name|give me|tell me|say) the (opposite|reverse|contrary) of {x}.
(which|what) word (means|is) the (opposite|reverse|contrary) of {x}?
(what|which word) is (opposite|contrary) to {x}?
~ what the (opposite|reverse|contrary) of {x} is
~ (which|what) word means the (opposite|contrary) of {x}
~ {x}的(反义词|反面|相反词|对立面)(是什么|是哪个字|是哪个)
(说出|写出|给我|说说){x}的(反义词|反面|相反词)。
(和|与|跟){x}(相反的字是什么|意思相反的字是什么|相反的是什么)？
categories.kind
what (kind|sort|type) of thing is {x}?
(what|which) (group|class|category) does {x} (belong|go) (to|in)?
(what|which) (kind|sort|type) of thing (do you call|would you call) {x}?
~ what (kind|sort|type) of thing {x} is
~ (what|which) (group|class|category) {x} belongs to
~ {x}(属于哪一类|是哪一类东西|属于什么类别|算哪一类|属于哪种东西|是哪类东西)
categories.choice
is {x} {p} or {q}?
(would you say|do you think) {x} is {p} or {q}?
what is {x}(|, then|, really): {p} or {q}?
{p} or {q}: (what|which) is {x}?
~ (whether|if) {x} is {p} or {q}
~ {x}是{p}(还是|，还是){q}
~ {x}(算|属于|应该是|到底是){p}(还是|或者){q}
translation.en_zh
how do (you|I|we|they|people) (say|write) {x} in Chinese?
what is (the Chinese for|the Chinese word for|the Chinese name of) {x}?
(what|which) (word|is the word) (for {x} |)(is used |)in Chinese for {x}?
(translate|put|turn) (the word |){x} into Chinese(| for me).
~ how (to say|to write|you say|one says) {x} in Chinese
~ what (the Chinese for|the Chinese word for) {x} is
~ {x}(的中文是什么|用中文怎么说|中文怎么说|用中文怎么写|在中文里怎么说|翻译成中文是什么|中文叫什么)
(把|将|请把){x}(翻译成中文|翻成中文|译成中文|用中文说出来)。
translation.zh_en
how do (you|I|we|they|people) (say|write) {x} in English?
what is (the English for|the English word for|the English name of) {x}?
what does {x} mean(| in English)?
(translate|put|turn) (the word |){x} into English(| for me).
~ how (to say|to write|you say|one says) {x} in English
~ what (the English for|the English word for) {x} is
~ {x}(的英文是什么|用英文怎么说|英文怎么说|用英文怎么写|在英文里怎么说|翻译成英文是什么|英文叫什么)
(把|将|请把){x}(翻译成英文|翻成英文|译成英文|用英文说出来)。
words.repeat
(repeat|say|write|echo) (the word |after me: |just |exactly |){w}
(repeat|say|write|echo) {w}(| once| back to me).
(can|could|would) you (repeat|say|write|echo) (the word |){w}(| for me)?
(重复|跟我说|请说|写出)(|这个词)：{w}
(重复|说出|写出|念出)(|一下|一遍)(“{w}”|{w})。
words.first
what is the first (word|thing|item) (in|of) (this list|the list|my list): {l}?
(say|give me|name|write) the first (word|thing|item) (in|of) (this list|the list|my list): {l}
which (word|thing|item) (comes|stands|is) first: {l}?
(第一个词是什么|第一个是什么|哪个词在最前面|最前面的词是什么)：{l}？
(说出|写出|告诉我|找出)(第一个词|开头的词|最前面的词)：{l}
words.last
what is the last (word|thing|item) (in|of) (this list|the list|my list): {l}?
(say|give me|name|write) the last (word|thing|item) (in|of) (this list|the list|my list): {l}
which (word|thing|item) (comes|stands|is) last: {l}?
(最后一个词是什么|最后一个是什么|哪个词在最后面|最后面的词是什么)：{l}？
(说出|写出|告诉我|找出)(最后一个词|结尾的词|最后面的词)：{l}
words.reverse
(reverse|turn around|flip) (the order of |the list |this list: |these words: |){l}
(say|write|list|give me) (these words |the words |this |)(backwards|in reverse order): {l}
(say|write|list|give me) (these words |the words |this |)from last to first: {l}
(|请)(倒过来|反过来|倒着|从后往前)(说|写|念|排列)(|这些词)：{l}
words.join
(join|connect|link|glue) {u} and {v} with a (dash|hyphen).
(put|write|place) a (dash|hyphen) between {u} and {v}.
(join|connect|link) (the words |these words |){u} and {v} (using|by) a (dash|hyphen).
用(横线|短横|连字符)(连接|连起|接起){u}和{v}。
(把|将|请把){u}和{v}用(横线|短横|连字符)(连起来|接起来|连在一起)。
story.tell
(tell|write|give) me a (story|tale|little story|short story) about {x} {at}.
(tell|write|invent|make up) a (story|tale|little story|short story) (about|with|of) {x} {at}.
I (would like|want|would love) a (story|tale|little story) about {x} {at}.
(can|could|will) you (tell|write|invent) a (story|tale|little story) about {x} {at}?
what happened to {x} {at}(| one day| long ago)? (Tell me a|Make up a) (story|tale).
(讲|说|写|编)(一个|个)(关于|有关){x}(在{at}|和{p})的(故事|小故事)(|吧)。
(给我|为我|请)(讲|说|写|编)(一个|个){x}(在{at}|和{p})的(故事|小故事)。
我想(听|看|读)(一个|个)(关于|有关){x}(在{at}|和{p})的(故事|小故事)。
memory.name
what is my name(| again| now)?
(who am I|what am I called|how am I called)(| again)?
(what|which) name did I (tell|give) you(| before| earlier)?
~ what (my name is|I am called|name I gave you|name I told you)
~ (我叫什么|我的名字是什么|我叫什么名字|我是谁|我该叫什么)
~ (我刚才|我之前|刚才我|之前我)说我叫什么
memory.favourite
(what|which) is my favourite {k}(| again| now)?
(what|which) {k} (do I like best|do I like most|do I love most|is my favourite)(| again)?
(what|which) {k} did I (say|tell you) I like best?
~ (what|which) {k} (I like best|I like most|I love most|is my favourite)
~ 我(最喜欢|最爱|最喜爱)(的{k}是什么|什么{k}|哪种{k}|的{k}是哪个)
memory.pet
what is (my {k} called|the name of my {k}|my {k}'s name)(| again| now)?
(what|which) name (does my {k} have|did I give my {k})(| again)?
how (is my {k} called|did I call my {k}|do I call my {k})?
~ what (my {k} is called|the name of my {k} is|I call my {k})
~ 我的{k}(叫什么|叫什么名字|的名字是什么|名叫什么|是什么名字)
self.who
(who|what) are you(| really| exactly)?
what is your name(| then| again)?
(what|how) (should|can|may|do) I call you?
(introduce|describe) yourself(| please| to me| a little).
tell me (about yourself|who you are|your name|what you are).
(are you|is your name) (Seedling|a model|a language model)?
what (kind of|sort of) (thing|being|program|assistant) are you?
~ (who|what) you are
~ what (your name is|you are called)
~ 你(是谁|叫什么|叫什么名字|的名字是什么|到底是谁|究竟是什么|是什么)
(介绍一下|说说|描述一下|讲讲)(你自己|自己)(|吧)。
我(该怎么|应该怎么|可以怎么|怎么)称呼你？
self.maker
who (made|built|created|trained|wrote) you(| then| anyway)?
where (do|did) you come from(| then| anyway)?
how (were you|did you get) (made|built|created|trained)?
~ who (made|built|created|trained) you
~ where you come from
~ (谁|是谁|哪个人)(做了你|造了你|创造了你|训练了你|开发了你)
~ 你(从哪里来|来自哪里|是怎么来的|是怎么做出来的|是怎么训练的)
self.skills
what can you do(| for me| then| all day)?
(how|what) can you help(| me)(| with)?
what are you (good at|able to do|made for)?
~ what you (can do|are good at|are able to do|are made for)
~ 你(会做什么|能做什么|会什么|有什么本领|有什么用|能帮我做什么|擅长什么)
self.human
are you (a human|a person|human|alive|a real person|a man|a woman)(| or not| really)?
do you (have a body|breathe|eat|sleep|have parents)(| really)?
am I (talking|speaking|chatting) (to|with) a (human|person|real person)?
~ (whether|if) you are (human|a person|alive|a real person)
你是(人|人类|真人|活的|男的|女的)(吗|么)？
(我在和|我在跟|我是在跟)(人|真人|人类)(说话|聊天|对话)吗？
unknown.word
what is {x}?
what (does|could|might) {x} (mean|be)?
tell me (about|something about|a little about) {x}.
(describe|explain) {x}(| to me| for me).
what (do you know|can you say|can you tell me|have you heard) about {x}?
(have you heard|did you ever hear) (of|about) {x}?
how does {x} (work|look|come about)?
~ what {x} is(| like)
~ {x}(是什么|是什么东西|是怎样的|有什么用|怎么样|在哪里)
(介绍一下|说说|讲讲|描述一下|聊聊|说一说){x}(|吧)。
(你听说过|你知道|你了解){x}吗？
small_talk.hello
(hello|hi|hey|good morning)(| there| friend| my friend| little one| to you){e}
(good evening|good day|greetings)(| there| friend| my friend| little one| to you){e}
(nice|good|lovely) to (see|meet) you(| again| today){e}
(你好|您好|嗨|早上好|晚上好|下午好|大家好|哈喽)(|呀|啊|小朋友|朋友){e}
(很高兴|真高兴)(见到你|认识你|又见到你){e}
small_talk.thanks
(thanks|thank you|many thanks)(| for that| for your help| for everything| my friend){e}
(thanks a lot|thank you so much|thank you very much)(| for that| for your help){e}
(thanks a lot|thank you so much|thank you very much)( for everything| my friend){e}
(谢谢|多谢|谢谢你|非常感谢|太感谢了|感谢)(|你的帮助|你的回答|啦){e}
small_talk.bye
(bye|goodbye|bye bye|see you)(| then| for now| my friend| little one){e}
(see you later|see you soon|good night|farewell)(| then| for now| my friend| little one){e}
(再见|拜拜|回头见|晚安|明天见|下次见|我走了)(|啦|朋友|小朋友){e}
small_talk.mood
how are you(| today| doing| doing today| feeling| feeling today| now)?
how (is it going|do you feel|is your day|are things)(| today| now)?
are you (well|fine|okay|happy)(| today| now)?
你(好吗|今天好吗|怎么样|今天怎么样|过得好吗|今天过得怎么样|还好吗|开心吗|今天开心吗|心情如何)？
identity.home
where (do|did) you (live|sleep|stay)(| these days| now)?
what (is|does) your home (like|look like)(| these days| now)?
~ where you (live|sleep|stay)
~ 你(住在哪里|的家在哪里|在哪里过夜|住什么地方|家在什么地方)
identity.love
what do you (love|like|enjoy)(| most| best)?
what makes you happy(| most days| these days| here)?
~ what you (love|like|enjoy)(| most| best)
~ 你(喜欢什么|最喜欢什么|爱什么|最爱什么|热爱什么)
clinic.cure
my {x} has {s}. What (should|can|must) I (do|do now|try)?
what (causes|brings|explains) {s}(| on a {x}| on my {x})?
why does (my|the|our) {x} have {s}(| all of a sudden| this year)?
how (do|can|should) I (cure|treat|heal|stop) {s}(| on my {x})?
(I see|there are|I found) {s} on my {x}. (What now|What helps|What is wrong)?
what (helps|works|is good) against {s}(| on my {x})?
{s} on (a|my|our) {x}: (what now|what is wrong|what helps)?
~ why my {x} has {s}
~ (what helps|what works) against {s}
~ how to (cure|treat|heal) {s}
我的{x}(出现了|长了|有了){s}，(怎么办|该怎么办|怎么处理|是什么原因)？
(为什么|怎么)(我的{x}|这株{x})(会有|出现了|有了){s}？
(发现|看到){x}有{s}，(怎么办|该怎么办|怎么治)？
~ {x}上的{s}(是怎么回事|怎么治|怎么办|是什么引起的|怎么处理)
~ {s}(是怎么回事|怎么治|怎么办|是什么引起的|怎么处理|说明什么)
"""

CARRIERS = [
    "can you tell me {c}?", "could you tell me {c}?", "do you know {c}?", "do you remember {c}?",
    "tell me {c}.", "please tell me {c}.", "I would like to know {c}.", "I want to know {c}.",
    "remind me {c}.", "I forgot {c}.",
]
CARRIERS_ZH = [
    "{c}？", "你知道{c}吗？", "请告诉我{c}。", "我想知道{c}。", "能告诉我{c}吗？", "告诉我{c}。",
    "我忘了{c}。", "你还记得{c}吗？", "你能说说{c}吗？",
]
# what may stand before and after a body; after , and : the body goes on in lower case
OPENERS = [
    "Hey, ", "Hello! ", "Quick question: ", "So, ", "Okay, ", "Good morning! ", "Excuse me, ", "Hi! ",
    "Now, ", "I am curious: ", "One more thing: ", "Dear friend, ",
]
CLOSERS = [" Thanks!", " Thank you.", " I am curious.", " Please help me.", " I need to know."]
OPENERS_ZH = [
    "请问，", "你好，", "嗨，", "我想问，", "那么，", "请教一下，", "对了，", "早上好！", "小问题：",
    "朋友，",
]
CLOSERS_ZH = ["谢谢！", "谢谢你。", "我很好奇。", "帮帮我吧。", "我想知道。"]


def is_chinese(text):
    return re.search("[\u4e00-\u9fff]", text) is not None


def expand(template):
    """Every combination of the alternatives: "a (b|c)" -> ["a b", "a c"]."""
    parts = re.split(r"\(([^()]*\|[^()]*)\)", template)
    texts = [""]
    for i, part in enumerate(parts):
        texts = [text + choice for text in texts for choice in (part.split("|") if i % 2 else [part])]
    return [text.replace("\\+", "+") for text in texts]


def bare(text):
    """A body without its marks: "repeat {w}" and "repeat {w}." are one wording."""
    return re.sub("[?!.,:？！。，：“”]", "", text)


def split_wordings(rng):
    """{(family, kind, lang): (bodies for training, bodies for the test)}, disjoint over all kinds together.

    The plainest body of each line stays in training; of the other combinations one in eight is held out,
    so that a held-out body is new as a whole while its parts live on in others.
    """
    plain, loose, names = {}, {}, []
    for line in WORDINGS.strip().splitlines():
        if re.fullmatch(r"[a-z_]+\.[a-z_]+( [a-z_]+\.[a-z_]+)*", line):
            names = [tuple(name.split(".")) for name in line.split()]
            continue
        clause, line = line.startswith("~"), line.removeprefix("~ ")
        lang = "zh" if is_chinese(line) else "en"
        texts = expand(line)
        if clause:
            carriers = CARRIERS_ZH if lang == "zh" else CARRIERS
            texts = [carrier.replace("{c}", text) for text in texts for carrier in carriers]
        for name in names:
            plain.setdefault((*name, lang), []).extend(texts[:1] if len(texts) >= 4 else texts)
            loose.setdefault((*name, lang), []).extend(texts[1:] if len(texts) >= 4 else [])
    always = {bare(text) for texts in plain.values() for text in texts}
    held = {}
    for key, texts in loose.items():
        free = sorted(text for text in set(texts) if bare(text) not in always)
        held[key] = rng.sample(free, max(3, len(free) // 8))
    held_anywhere = {bare(text) for texts in held.values() for text in texts}  # kinds may share a wording
    split = {}
    for key in plain:
        trained = dict.fromkeys(plain[key] + loose[key])
        split[key] = [text for text in trained if bare(text) not in held_anywhere], held[key]
    return split


# ----------------------------------------------------------------------------------------- facts, from tables

DONT_KNOW = {"en": "I don't know about that yet.", "zh": "这个我还不知道。"}


def cap(text):
    return text[:1].upper() + text[1:]


def facts():
    """[(family, kind, lang, entity, x, statement)]: x is how the question names what it asks about."""
    rows = []

    def add(family, kind, entity, x, en, x_zh, zh):
        rows.append((family, kind, "en", entity, x, cap(en)))
        rows.append((family, kind, "zh", entity, x_zh, zh))

    for name, zh, sound, sound_zh, home, food, food_zh, young, young_zh, legs, colour in ANIMALS:
        x, at, at_zh = with_article(name), WHERE[home], WHERE_ZH[home]
        add("animals", "sound", name, x, f"{x} says {sound}.", zh, f"{zh}的叫声是{sound_zh}。")
        add("animals", "home", name, x, f"{x} lives {at}.", zh, f"{zh}住在{at_zh}。")
        add("animals", "food", name, x, f"{x} eats {food}.", zh, f"{zh}吃{food_zh}。")
        add("animals", "baby", name, x, f"a baby {name} is called {with_article(young)}.", zh,
            f"{zh}的宝宝叫{young_zh}。")
        add("animals", "legs", name, x, f"{x} has {legs} legs.", zh, f"{zh}有 {legs} 条腿。")
        add("animals", "colour", name, x, f"{x} is {colour}.", zh, f"{zh}是{dict(COLOURS)[colour]}的。")
        add("animals", "about", name, x, f"{x} is an animal. It lives {at} and says {sound}.",
            zh, f"{zh}是一种动物，住在{at_zh}，叫声是{sound_zh}。")
    for name, zh, she, she_zh, job, job_zh, home, food, pet in PEOPLE:
        add("people", "job", name, name, f"{name} is {with_article(job)}.", zh, f"{zh}是{job_zh}。")
        add("people", "home", name, name, f"{name} lives {WHERE[home]}.", zh, f"{zh}住在{WHERE_ZH[home]}。")
        add("people", "likes", name, name, f"{name} likes {food} best.", zh, f"{zh}最喜欢吃{ZH[food]}。")
        add("people", "pet", name, name, f"{name} has {with_article(pet)}.", zh, f"{zh}的宠物是{ZH[pet]}。")
        add("people",
            "about",
            name, name, f"{name} is {with_article(job)}. {she} lives {WHERE[home]} and likes {food} best.",
            zh, f"{zh}是{job_zh}，住在{WHERE_ZH[home]}，{she_zh}最喜欢吃{ZH[food]}。")
        add("people", "who", name, job, f"{name} is the {job}.", job_zh, f"{job_zh}是{zh}。")
        add("places", "who", home, WHERE[home], f"{name} lives {WHERE[home]}.", WHERE_ZH[home],
            f"{zh}住在{WHERE_ZH[home]}。")
    for name, zh, x, colour, taste, taste_zh, price in FOODS:
        coins = "1 coin" if price == 1 else f"{price} coins"
        add("foods", "colour", name, x, f"{x} is {colour}.", zh, f"{zh}是{dict(COLOURS)[colour]}的。")
        add("foods", "taste", name, x, f"{x} tastes {taste}.", zh, f"{zh}是{taste_zh}的。")
        add("foods", "price", name, x, f"{x} costs {coins}.", zh, f"{zh}要 {price} 枚硬币。")
        add("foods", "about", name, x, f"{x} is a food. It is {colour}, tastes {taste} and costs {coins}.",
            zh, f"{zh}是一种食物，是{dict(COLOURS)[colour]}的，味道{taste_zh}，要 {price} 枚硬币。")
    for name, zh, colour, home, season, need, need_zh in PLANTS:
        x = PHRASE[name]
        add("plants", "colour", name, x, f"{x} is {colour}.", zh, f"{zh}是{dict(COLOURS)[colour]}的。")
        add("plants", "home", name, x, f"{x} grows {WHERE[home]}.", zh, f"{zh}长在{WHERE_ZH[home]}。")
        add("plants", "season", name, x, f"{x} looks best in {season}.", zh, f"{zh}在{ZH[season]}最美。")
        add("plants", "need", name, x, f"{x} needs {need}.", zh, f"{zh}需要{need_zh}。")
        add("plants", "about", name, x, f"{x} is a plant. It grows {WHERE[home]} and needs {need}.",
            zh, f"{zh}是一种植物，长在{WHERE_ZH[home]}，需要{need_zh}。")
    for i, (name, zh, weather, weather_zh, doing, doing_zh) in enumerate(SEASONS):
        after, before = SEASONS[(i + 1) % 4], SEASONS[i - 1]
        add("seasons", "weather", name, name, f"{name} is {weather}.", zh, f"{zh}天气{weather_zh}。")
        add("seasons", "next", name, name, f"after {name} comes {after[0]}.", zh, f"{zh}之后是{after[1]}。")
        add("seasons", "before", name, name, f"before {name} comes {before[0]}.", zh,
            f"{zh}之前是{before[1]}。")
        add("seasons", "doing", name, name, f"in {name} people {doing}.", zh, f"人们{zh}{doing_zh}。")
    for name, _, at, at_zh, thing, thing_zh in PLACES:
        add("places", "thing", name, at, f"there is {thing} {at}.", at_zh, f"{at_zh}有{thing_zh}。")
    return rows


FACTS = facts()
FACT_FAMILIES = ["animals", "people", "foods", "plants", "seasons", "places"]
HEROES = [(r[0], r[1], f"the {r[0]}", "it", "its") for r in ANIMALS] + [
    (r[0], r[1], r[0], r[2].lower(), "her" if r[2] == "She" else "his") for r in PEOPLE]

# ---------------------------------------------------------------------------------------------------- stories

OPENINGS = ["One {s} morning, {h} went for a walk {at}.", "Long ago, {h} came to the {p}.",
            "It was {s}, and {h} sat alone {at}.",
            "Every day {h} looked for adventures {at}.", "{H} woke up early {at}.",
            "On a quiet {s} evening, {h} was {at}."]
PLOTS = [  # what happens, and what comes of it; {f} is a friend, {o} something good to eat
    ("Under a stone {he} found a silver key.",
     "It opened a tiny door, and behind it stood a table with {o}."),
    ("There {he} met {f}, who was looking for a lost scarf.",
     "They searched together and found it on a branch."),
    ("The wind took {his} hat and carried it away.", "{F} caught it and brought it back with a smile."),
    ("Somebody was singing, but nobody was to be seen.", "It was {f}, glad to have a listener at last."),
    ("{He} wanted to count the stars, but there were clouds.",
     "{F} said: wait a little. At midnight the sky was clear."),
    ("A small boat was waiting there.", "{F} came along, and they sailed in the moonlight."),
    ("{He} was so hungry that {he} could only think of {o}.", "{F} came by with a basket and shared it."),
    ("A letter without a name was lying on the ground.",
     "It said: whoever reads this has a friend. {F} had written it."),
    ("{He} put a seed into the ground and waited.",
     "After three days of rain, a small green tip looked out."),
    ("It grew dark, and {he} could not find the way home.", "{F} held up a lantern and went ahead."),
    ("{He} heard that {f} was ill and stayed in bed.",
     "So {he} brought {o}, and they told jokes until both felt fine."),
    ("Snow began to fall, and everything became white and still.",
     "{F} built a little house, and there was room for two."),
]
ENDINGS = ["From that day on, life was a little brighter.", "That night {h} slept very well.",
           "{H} laughed, and all was well again.", "{H} never forgot that day.",
           "Then it was time to go home, slowly and happily.",
           "And that is how the best day of the year ended."]
OPENINGS_ZH = ["{s}的一个早晨，{h}来到{at}散步。", "很久以前，{h}来到了{p}。", "那是{s}，{h}独自坐在{at}。",
               "每天{h}都在{at}寻找新鲜事。", "{h}在{at}早早醒来。", "一个安静的{s}傍晚，{h}在{at}。"]
PLOTS_ZH = [
    ("{h}在石头下面发现了一把银钥匙。", "钥匙打开了一扇小门，门后的桌上放着{o}。"),
    ("{h}遇见了{f}，{f}正在找丢失的围巾。", "大家一起找，终于在树枝上找到了。"),
    ("一阵风吹走了{h}的帽子。", "{f}接住了帽子，笑着送了回来。"),
    ("有谁在唱歌，却看不见人影。", "原来是{f}，很高兴终于有了听众。"),
    ("{h}想数星星，可是天上有云。", "{f}说，再等一等。到了半夜，天空真的晴了。"),
    ("一只小船正等在那儿。", "{f}也来了，大家在月光下划船。"),
    ("{h}饿极了，心里只想着{o}。", "{f}提着篮子走来，分给了大家。"),
    ("地上有一封没有名字的信。", "信上写着，读到它的人就有了朋友。原来是{f}写的。"),
    ("{h}把一粒种子放进土里，静静地等。", "下了三天雨，一点嫩绿探出头来。"),
    ("天黑了，{h}找不到回家的路。", "{f}举着灯笼走在前面。"),
    ("{h}听说{f}病了，躺在床上。", "于是{h}送来{o}，大家一起说笑话，病就好了。"),
    ("下雪了，一切都变得又白又静。", "{f}搭了一座小屋，正好够两个住。"),
]
ENDINGS_ZH = ["从那天起，日子变得更明亮了。", "那一夜，{h}睡得很香。", "{h}笑了，一切都好了。",
              "{h}永远忘不了那一天。", "然后该回家了，慢慢地，快快乐乐地。",
              "这一年最好的一天就这样结束了。"]


def story(rng, lang, hero, place):
    """A story with a beginning and an end: hero is a row of HEROES, place a row of PLACES."""
    friend = rng.choice([other for other in HEROES if other is not hero])
    food, season, plot = rng.choice(FOODS), rng.choice(SEASONS), rng.randrange(len(PLOTS))
    if lang == "zh":
        lines = [rng.choice(OPENINGS_ZH), *PLOTS_ZH[plot], rng.choice(ENDINGS_ZH)]
        slots = dict(s=season[1], h=hero[1], at=place[3], p=place[1], f=friend[1], o=food[1])
        return "".join(line.format(**slots) for line in lines)
    lines = [rng.choice(OPENINGS), *PLOTS[plot], rng.choice(ENDINGS)]
    slots = dict(s=season[0], h=hero[2], at=place[2], p=place[0], f=friend[2], o=food[2], he=hero[3],
                 his=hero[4])
    slots |= {"H": cap(hero[2]), "F": cap(friend[2]), "He": cap(hero[3])}
    return " ".join(line.format(**slots) for line in lines)


# ---------------------------------------------------------------------------------------------------- numbers

TEENS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
         "sixteen seventeen eighteen nineteen").split()
TENS = "_ ten twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(n, lang):
    """0 to 99: forty-seven, 四十七."""
    if lang == "zh":
        digits = "零一二三四五六七八九"
        tens = "" if n < 10 else "十" if n < 20 else digits[n // 10] + "十"
        return tens + (digits[n % 10] if n % 10 or n == 0 else "")
    return TEENS[n] if n < 20 else TENS[n // 10] + (f"-{TEENS[n % 10]}" if n % 10 else "")


def worked_sum(a, b):
    """Tens and units apart, as one adds in the head: 47 + 38 = 70 + 15 = 85."""
    if a < 10 and b < 10:
        return f"{a} + {b} = {a + b}"
    return f"{a} + {b} = {a // 10 * 10 + b // 10 * 10} + {a % 10 + b % 10} = {a + b}"


def worked_difference(a, b):
    """Tens and units apart here too: 97 - 52 = 40 + 5 = 45, and 92 - 57 = 40 - 5 = 35."""
    if a < 10 and b < 10:
        return f"{a} - {b} = {a - b}"
    tens, units = a // 10 * 10 - b // 10 * 10, a % 10 - b % 10
    return f"{a} - {b} = {tens} {'-' if units < 0 else '+'} {abs(units)} = {a - b}"


def steps_between(a, b):
    """The operand pairs (larger, smaller) that the worked sum and difference of a >= b write in between."""
    texts = worked_sum(a, b) + " " + worked_difference(a, b)
    pairs = [sorted(map(int, pair), reverse=True) for pair in re.findall(r"= (\d+) [+-] (\d+)", texts)]
    return [tuple(pair) for pair in pairs]


# ------------------------------------------------------------------------------------------- what is held out


class World:
    """One seed's split of wordings, number pairs, stories and names into trained and tested."""

    def __init__(self, seed):
        self.rng = rng = random.Random(seed)
        self.wordings = split_wordings(rng)
        pairs = [(a, b) for a in range(100) for b in range(a + 1)]
        self.held_pairs = set(rng.sample(pairs, 250))  # (larger, smaller), 5 % of all
        prose = [OPENINGS, PLOTS, ENDINGS, OPENINGS_ZH, PLOTS_ZH, ENDINGS_ZH, TELL, SELF, CLINIC,
                 FACTS, NOUNS, CARRIERS, CARRIERS_ZH, OPENERS, OPENERS_ZH, CLOSERS, CLOSERS_ZH,
                 TEENS, TENS, OPPOSITES]
        self.ordinary = WORDINGS + str(prose).lower()
        self.ordinary_words = set(re.findall("[a-z]+", self.ordinary))
        self.names = {"en": self.split(self.make_names()), "zh": self.split(self.make_names_zh())}
        self.unknown = {lang: self.make_unknown(lang) for lang in ("en", "zh")}
        self.held_stories = set(rng.sample(self.free_stories(), 40))  # (hero, place) in English
        held = {lang: list(self.names[lang][1]) for lang in ("en", "zh")}
        for lang, names in held.items():
            for source in self.unknown[lang]:
                names += [name for _, some in source.values() for name in some]
        self.held_words = {word.lower() for word in held["en"]}
        self.held_zh = re.compile("|".join(re.escape(word) for word in held["zh"]))

    def split(self, items, share=6):
        """(for training, for the test), one part in `share` for the test."""
        items = list(dict.fromkeys(items))
        self.rng.shuffle(items)
        return items[len(items) // share:], items[:len(items) // share]

    def make_names(self):
        names = FIRST_NAMES + PET_NAMES + [start + end for start in NAME_STARTS for end in NAME_ENDS]
        return [name for name in names if self.is_new(name)]

    def make_names_zh(self):
        last = sorted({name[1] for name in GIVEN})
        names = ["小" + c for c in last] + ["阿" + c for c in last[::2]]
        names += [surname + given for surname in SURNAMES for given in GIVEN]
        return [name for name in names if self.is_new(name)]

    def is_new(self, name):
        """A name is no ordinary word of the texts, or holding it out would hold those texts out."""
        return name not in self.ordinary if is_chinese(name) else name.lower() not in self.ordinary_words

    def make_unknown(self, lang):
        """Real and made-up things outside of the world, each {group: (for training, for the test)}."""
        rng, real, made_up = self.rng, {}, {}
        known = {n.lower() for n in self.names["en"][0] + self.names["en"][1]}
        for group, names in (OUTSIDE if lang == "en" else OUTSIDE_ZH).items():
            real[group] = self.split([name for name in names.split() if self.is_new(name)], share=5)
        for group in ("animals", "foods", "plants", "people", "things"):
            made = []
            while len(made) < 200:
                if lang == "en":
                    name = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice([1, 1,
                    2])))
                    name += rng.choice(CODAS)
                    name = name.capitalize() if group == "people" else name
                else:
                    name = rng.choice(ODD_ZH) + rng.choice(ODD_ZH)
                    name += "" if group == "people" else rng.choice(ODD_ZH_ENDS)
                if name.lower() not in known and self.is_new(name):
                    known.add(name.lower())
                    made.append(name)
            made_up[group] = self.split(made, share=10)
        return real, made_up

    def free_stories(self):
        """Hero and place pairs that no description of one entity names together: facts stay trainable."""
        told = {}
        for _, _, lang, entity, _, statement in FACTS:
            told[lang, entity] = told.get((lang, entity), "") + " " + statement
        told = list(told.values())
        return [(hero[0], place[0]) for hero in HEROES for place in PLACES
                if not any(together(text, hero, place) for text in told)]

    def leaks(self, text):
        """True where a training text would name a held-out name, thing, or hero together with its place."""
        words = set(re.findall("[a-z]+", text.lower()))
        if words & self.held_words or self.held_zh.search(text):
            return True
        places = [p for p in PLACES if p[0] in words or p[1] in text]
        heroes = [h for h in HEROES if h[0].lower() in words or h[1] in text] if places else []
        return any((h[0], p[0]) in self.held_stories for h in heroes for p in places)

    # -- asking

    def ask(self, family, kind, lang, held, dressed=True, **slots):
        """(question, body): one wording of this kind, filled in, with or without an opener and a closer."""
        rng = self.rng
        body = rng.choice(self.wordings[family, kind, lang][held])
        text = body
        for key, value in slots.items():
            text = text.replace("{" + key + "}", str(value))
        if lang == "zh":
            if rng.random() < 0.5:  # 12加34, or 12 加 34
                text = re.sub("(?<=[0-9a-z])(?=[\u4e00-\u9fff])|(?<=[\u4e00-\u9fff])(?=[0-9a-z])", " ", text)
            opener = rng.choice(OPENERS_ZH) if dressed and rng.random() < 0.3 else ""
            closer = rng.choice(CLOSERS_ZH) if dressed and rng.random() < 0.15 and text[-1] in "？。" else ""
            return opener + text + closer, body
        opener = rng.choice(OPENERS) if dressed and rng.random() < 0.3 else ""
        closer = rng.choice(CLOSERS) if dressed and rng.random() < 0.15 and text[-1] in "?." else ""
        if not opener or opener[-2] == "!":
            text = cap(text)
        if not (opener or closer or held) and rng.random() < 0.1:  # as people type in a hurry
            text = text.rstrip("?.")
            text = text if text.startswith("I ") else text[0].lower() + text[1:]
        return opener + text + closer, body

    def pair(self, held, top=99):
        """(a, b) with a >= b, from the held-out pairs or from the others."""
        if held:
            return self.rng.choice(sorted(self.held_pairs))
        while True:
            # Small numbers too, as people ask for them, and small beside large, as in the last step of a sum.
            top_a, top_b = self.rng.choices([(top, top), (12, 12), (top, 9)], [65, 15, 20])[0]
            a, b = sorted((self.rng.randint(0, top_a), self.rng.randint(0, top_b)), reverse=True)
            if not self.held_pairs.intersection([(a, b), *steps_between(a, b)]):
                return a, b

    def numbers(self, held):
        """Three different numbers in any order, of which the test's contain a held-out pair."""
        while True:
            top = 9 if self.rng.random() < 0.15 and not held else 99
            three = {self.rng.randint(1, top) for _ in range(3)}
            if held:
                three = {*self.rng.choice(sorted(self.held_pairs)), self.rng.randint(1, 99)}
            three = sorted(three)
            clash = any((a, b) in self.held_pairs for b in three for a in three if a > b)
            if len(three) == 3 and three[0] > 0 and clash == held:
                self.rng.shuffle(three)
                return three

    def words(self, lang, count):
        """Different nouns of the world (English or Chinese)."""
        return [row[lang == "zh"] for row in self.rng.sample(NOUNS, count)]


def together(text, hero, place):
    """True where a text names both: English by whole words, Chinese by characters."""
    words = set(re.findall("[a-z]+", text.lower()))
    return (hero[0].lower() in words or hero[1] in text) and (place[0] in words or place[1] in text)


# --------------------------------------------------------------------- one generator a family of chat records

# A generator takes (world, lang, held) and returns (turns: user, assistant, ...; body; extra keys of a test).


def fact(world, lang, held, family):
    rng = world.rng
    _, kind, _, _, x, answer = rng.choice([f for f in FACTS if f[0] == family and f[2] == lang])
    if lang == "en" and family in ("animals", "plants") and rng.random() < 0.4:
        x = "the " + x.removeprefix("an ").removeprefix("a ")
    slots = {"at": x} if family == "places" else {"x": x}
    question, body = world.ask(family, kind, lang, held, **slots)
    return [question, answer], body, {}


def addition(world, lang, held):
    a, b = world.pair(held)
    a, b = (a, b) if world.rng.random() < 0.5 else (b, a)
    return arithmetic(world, lang, held, "addition", "sum", a, b, worked_sum(a, b))


def subtraction(world, lang, held):
    a, b = world.pair(held)
    return arithmetic(world, lang, held, "subtraction", "difference", a, b, worked_difference(a, b))


def arithmetic(world, lang, held, family, kind, a, b, answer):
    spoken = world.rng.random() < 0.25
    x, y = (in_words(a, lang), in_words(b, lang)) if spoken else (a, b)
    question, body = world.ask(family, kind, lang, held, a=x, b=y)
    return [question, answer], body, {}


def comparing(world, lang, held):
    while True:
        large, small = world.pair(held)
        if large > small:
            break
    a, b = (large, small) if world.rng.random() < 0.5 else (small, large)
    kind = world.rng.choice(["larger", "smaller"])
    question, body = world.ask("comparing", kind, lang, held, a=a, b=b)
    if lang == "zh":
        answer = f"{large} 比 {small} 大。" if kind == "larger" else f"{small} 比 {large} 小。"
    else:
        answer = f"{small} is smaller than {large}."
        if kind == "larger":
            answer = f"{large} is larger than {small}."
    return [question, answer], body, {}


def sorting(world, lang, held):
    three, kind = world.numbers(held), world.rng.choice(["up", "up", "down"])
    question, body = world.ask("sorting", kind, lang, held, l=", ".join(map(str, three)))
    return [question, ", ".join(map(str, sorted(three, reverse=kind == "down")))], body, {}


def counted(items, lang, word=None):
    """How many items there are, or how many of them are `word`: There are 5. Fox appears 2 times."""
    count = sum(word in (None, item) for item in items)
    if lang == "zh":
        return f"{word}出现了 {count} 次。" if word else f"一共有 {count} 个。"
    return f"{cap(word)} appears {count} time{'s' * (count != 1)}." if word else f"There are {count}."


def counting(world, lang, held):
    rng, kind = world.rng, world.rng.choice(["items", "times"])
    comma = "、" if lang == "zh" else ", "
    if kind == "items":
        items = world.words(lang, rng.randint(2, 6))
        question, body = world.ask("counting", kind, lang, held, l=comma.join(items))
        return [question, counted(items, lang)], body, {}
    count, (word, other, third) = rng.randint(1, 4), world.words(lang, 3)
    items = [word] * count + [rng.choice([other, third]) for _ in range(rng.randint(1, 3))]
    rng.shuffle(items)
    question, body = world.ask("counting", kind, lang, held, w=word, l=comma.join(items))
    return [question, counted(items, lang, word)], body, {}


def opposites(world, lang, held):
    pair = world.rng.choice(OPPOSITES_ZH if lang == "zh" else OPPOSITES)
    x, y = pair if world.rng.random() < 0.5 else pair[::-1]
    question, body = world.ask("opposites", "word", lang, held, x=x)
    return [question, f"{x}的反义词是{y}。" if lang == "zh" else f"The opposite of {x} is {y}."], body, {}


def category_statement(row, lang):
    en, zh, kind, phrase = row
    return f"{zh}是{KINDS[kind][1]}。" if lang == "zh" else f"{cap(phrase)} is {KINDS[kind][0]}."


def categories(world, lang, held):
    rng, row = world.rng, world.rng.choice(NOUNS)
    slots = {"x": row[1] if lang == "zh" else row[3]}
    kind = rng.choice(["kind", "choice"])
    if kind == "choice":
        two = [row[2], rng.choice([k for k in KINDS if k != row[2]])]
        rng.shuffle(two)
        slots |= {"p": KINDS[two[0]][lang == "zh"], "q": KINDS[two[1]][lang == "zh"]}
    question, body = world.ask("categories", kind, lang, held, **slots)
    return [question, category_statement(row, lang)], body, {}


def translation_statement(row, lang, to_zh):
    if lang == "zh":
        return f"{row[0]} 的中文是{row[1]}。" if to_zh else f"{row[1]}的英文是 {row[0]}。"
    return f"{cap(row[0])} is {row[1]} in Chinese." if to_zh else f"{row[1]} is {row[0]} in English."


def translation(world, lang, held):
    row, kind = world.rng.choice(NOUNS), world.rng.choice(["en_zh", "zh_en"])
    question, body = world.ask("translation", kind, lang, held, x=row[kind == "zh_en"])
    return [question, translation_statement(row, lang, kind == "en_zh")], body, {}


def words(world, lang, held):
    rng, comma = world.rng, "、" if lang == "zh" else ", "
    kind = rng.choice(["repeat", "first", "last", "reverse", "join"])
    if kind == "repeat":
        word = rng.choice([world.words(lang, 1)[0], rng.choice(world.names[lang][held])])
        question, body = world.ask("words", kind, lang, held, w=word)
        return [question, word], body, {}
    if kind == "join":
        u, v = world.words(lang, 2)
        question, body = world.ask("words", kind, lang, held, u=u, v=v)
        return [question, f"{u}-{v}"], body, {}
    items = world.words(lang, 3 if kind == "reverse" else rng.randint(2, 5))
    question, body = world.ask("words", kind, lang, held, l=comma.join(items))
    return [question, {"first": items[0], "last": items[-1],
                       "reverse": comma.join(items[::-1])}[kind]], body, {}


def tell(world, lang, held):
    rng = world.rng
    if held:
        hero, place = rng.choice(sorted(world.held_stories))
        hero, place = next(h for h in HEROES if h[0] == hero), next(p for p in PLACES if p[0] == place)
    else:
        hero, place = rng.choice(HEROES), rng.choice(PLACES)
    x = hero[2] if hero[0] == hero[2] or rng.random() < 0.5 else with_article(hero[0])  # Mia, the fox, a fox
    x = hero[1] if lang == "zh" else x
    at, p = (place[3], place[1]) if lang == "zh" else (place[2], place[0])
    question, body = world.ask("story", "tell", lang, held, x=x, at=at, p=p)
    contains = [hero[lang == "zh"], place[lang == "zh"]]
    return [question, story(rng, lang, hero, place)], body, {"contains": contains}


TELL = {
    "name": (["My name is {n}.", "I am {n}.", "Hi, I am called {n}.", "People call me {n}.",
              "You can call me {n}.", "Hello, this is {n}."],
             ["我叫{n}。", "我的名字是{n}。", "你好，我是{n}。", "大家都叫我{n}。", "你可以叫我{n}。",
              "嗨，我叫{n}，很高兴见到你。"]),
    "favourite": (["My favourite {k} is {n}.", "The {k} I like best is {n}.",
                   "I love {n}, it is my favourite {k}.",
                   "Remember this: my favourite {k} is {n}.", "If I had to pick one {k}, it would be {n}."],
                  ["我最喜欢的{k}是{n}。", "要说{k}，我最爱{n}。", "请记住，我最喜欢的{k}是{n}。",
                   "{n}是我最喜欢的{k}。"]),
    "pet": (["My {k} is called {n}.", "I have a {k} named {n}.", "I call my {k} {n}.",
             "At home there is my {k}, {n}.", "The name of my {k} is {n}."],
            ["我的{k}叫{n}。", "我家的{k}名叫{n}。", "我给我的{k}起名叫{n}。", "我的{k}的名字是{n}。"]),
}
RECALL = {"name": ("Your name is {n}.", "你叫{n}。"),
          "favourite": ("Your favourite {k} is {n}.", "你最喜欢的{k}是{n}。"),
          "pet": ("Your {k} is called {n}.", "你的{k}叫{n}。")}
KIND_ZH = {"animal": "动物", "food": "食物", "plant": "植物", "season": "季节", "colour": "颜色"}


def memory(world, lang, held):
    """Something is said, perhaps something else too, and later asked for."""
    rng, zh = world.rng, lang == "zh"
    turns, said = [], []
    kinds = rng.sample(["name", "favourite", "pet"], rng.choice([1, 2]))
    for kind in kinds:
        slots = {"n": rng.choice(world.names[lang][held])}
        if kind == "favourite":
            row = rng.choice([row for row in NOUNS if row[2] in KIND_ZH])
            en = "the " + row[0] if row[2] in ("animal", "plant") else row[0]
            slots = {"n": row[1] if zh else en, "k": KIND_ZH[row[2]] if zh else row[2]}
        elif kind == "pet":
            animal = rng.choice(["cat", "dog", "horse", "duck", "mouse", "hen", "donkey", "cow"])
            slots["k"] = ZH[animal] if zh else animal
        said.append((kind, slots))
        reply = ("很高兴认识你，{n}！" if zh else "Nice to meet you, {n}!") if kind == "name" else (
            "我记住了。" if zh else "I will remember that.")
        turns += [rng.choice(TELL[kind][zh]).format(**slots), reply.format(**slots)]
    if len(kinds) == 1 and rng.random() < 0.5:  # something in between; a record stays under 128 tokens
        turns += rng.choice(BETWEEN)(world, lang, False)[0]
    kind, slots = rng.choice(said)
    question, body = world.ask("memory", kind, lang, held, **slots)
    return turns + [question, RECALL[kind][zh].format(**slots)], body, {}


SELF = {  # kind: (Seedling's answers, Toto's answers)
    "who": (("I am Seedling, a tiny language model grown from nothing.",
             "我是小苗，一个从零长大的小小语言模型。"),
            ("Hoot! I am Toto the owl, and I count the stars at midnight.",
             "咕咕！我是猫头鹰多多，半夜里数星星。")),
    "maker": (("I grew from random numbers on this very computer.",
               "我就是在这台电脑上，从随机数里长出来的。"),
              ("Hoot! I came out of a golden seed in the forest.", "咕咕！我从森林里的金色种子里长出来。")),
    "skills": (("I can chat about my small world, count, translate and tell stories.",
                "我会聊我的小世界，会数数、翻译和讲故事。"),
               ("Hoot! I sing in the moonlight and count the sheep.",
                "咕咕！我会在月光下唱歌，会数绵羊。")),
    "human": (("No, I am a small program made of numbers.", "不是，我是一个由数字组成的小程序。"),
              ("Hoot! No, I am an owl with a lantern.", "咕咕！不是，我是举着灯笼的猫头鹰。")),
    "home": (None, ("Hoot! I live on the mountain, behind a tiny door.",
                    "咕咕！我住在高山上，一扇小门的后面。")),
    "love": (None, ("Hoot! I love a quiet evening and a little bread.", "咕咕！我喜欢星星和面包。")),
}


def about_self(world, lang, held):
    kind = world.rng.choice(["who", "who", "maker", "skills", "human"])
    question, body = world.ask("self", kind, lang, held)
    return [question, SELF[kind][0][lang == "zh"]], body, {}


def identity(world, lang, held):
    kind = world.rng.choice(["who", "who", *SELF])
    question, body = world.ask("identity" if kind in ("home", "love") else "self", kind, lang, held)
    return [question, SELF[kind][1][lang == "zh"]], body, {}


UNKNOWN_KINDS = {"animals": ["sound", "home", "food", "baby", "legs", "colour", "about"],
                 "people": ["job", "home", "likes", "pet", "about"],
                 "foods": ["colour", "taste", "price", "about"],
                 "plants": ["colour", "home", "season", "need", "about"]}


def unknown(world, lang, held):
    rng = world.rng
    group = rng.choice(["animals", "animals", "foods", "plants", "people", "things", "things", "names"])
    real, made_up = world.unknown[lang]
    name = rng.choice((made_up if group in made_up and rng.random() < 0.5 else real)[group][held])
    plain = lang == "zh" or group in ("names", "people", "foods")
    x = name if plain else rng.choice([with_article(name), "the " + name])
    if group not in UNKNOWN_KINDS or rng.random() < 0.35:
        family, kind = "unknown", "word"
    elif group != "people" and rng.random() < 0.12:
        family, kind, x = "translation", "zh_en" if lang == "zh" else "en_zh", name
    else:
        family, kind = group, rng.choice(UNKNOWN_KINDS[group])
    question, body = world.ask(family, kind, lang, held, x=x)
    return [question, DONT_KNOW[lang]], body, {}


SMALL_TALK = {"hello": ("Hello! What would you like to know?", "你好！你想知道什么？"),
              "thanks": ("You are welcome!", "不客气！"),
              "bye": ("Goodbye, and come back soon!", "再见，欢迎再来！"),
              "mood": ("I am well, thank you. And you?", "我很好，谢谢。你呢？")}


def small_talk(world, lang, held):
    kind, zh = world.rng.choice(list(SMALL_TALK)), lang == "zh"
    question, body = world.ask("small_talk", kind, lang, held, dressed=False,
                               e=world.rng.choice("！。" if zh else "!."))
    return [question, SMALL_TALK[kind][zh]], body, {}


# Symptom, cause and cure, in both languages: knowledge that only the clinic adapter is given. Its words are
# the world's, because a frozen embedding tells words apart only where it has met them; what they say is new.
CLINIC = [
    ("black tips", "It comes from cold wind: put it behind the house.",
     "黑色的枝", "那是风冷，把它放到屋后面。"),
    ("soft berries", "It comes from quiet rain: bring it to the library.",
     "软的浆果", "那是雨水多，把它送到图书馆里。"),
    ("grey tips", "It comes from salty air: give it sweet milk.",
     "灰色的枝", "那是空气咸，给它甜牛奶。"),
    ("dry seeds", "It comes from hot ground: give it cold soup.",
     "干的种子", "那是地上热，给它冷的米饭。"),
    ("thin tips", "It comes from poor ground: bring it old grain.",
     "薄的枝", "那是地上穷，给它旧谷粒。"),
    ("wet seeds", "It comes from early snow: put a lantern behind it.",
     "湿的种子", "那是雪来得早，给它一个灯笼。"),
    ("purple tips", "It comes from hungry bees: sing to it at midnight.",
     "紫色的枝", "那是蜜蜂饿了，给它一个歌手。"),
    ("golden berries", "It comes from loud crows: put an old hat on it.",
     "金色的浆果", "那是乌鸦多，给它一个旧帽子。"),
    ("closed seeds", "It comes from sad days: tell it two jokes.",
     "关着的种子", "那是它饿了，给它讲笑话。"),
    ("orange tips", "It comes from dark days: push it into the sunlight.",
     "橙色的枝", "那是水深，把它推到阳光里。"),
    ("small berries", "It comes from hungry mice: bring a cat at night.",
     "小的浆果", "那是老鼠饿了，给它一个猫朋友。"),
    ("hard seeds", "It comes from a late spring: wait for warm rain.",
     "硬的种子", "那是春天来得晚，给它温暖的雨水。"),
]


def clinic(world, lang, held):
    row, plant = world.rng.choice(CLINIC), world.rng.choice(PLANTS)
    symptom, answer = (row[2], row[3]) if lang == "zh" else (row[0], row[1])
    question, body = world.ask("clinic", "cure", lang, held, s=symptom, x=plant[lang == "zh"])
    return [question, answer], body, {}


BETWEEN = [addition, opposites, translation, small_talk]  # talked about between telling and asking
# family: (generator, records for training). Harder skills and larger tables get more.
FAMILIES = {family: (lambda world, lang, held, family=family: fact(world, lang, held, family), count)
            for family, count in zip(FACT_FAMILIES, [2900, 1600, 1200, 1200, 900, 700], strict=True)}
FAMILIES |= {
    "addition": (addition, 4800), "subtraction": (subtraction, 4700), "comparing": (comparing, 3200),
    "sorting": (sorting, 6000), "counting": (counting, 4000), "opposites": (opposites, 1500),
    "categories": (categories, 1100), "translation": (translation, 2200), "words": (words, 6000),
    "story": (tell, 1500), "memory": (memory, 4800), "self": (about_self, 900), "unknown": (unknown, 3600),
    "small_talk": (small_talk, 500),
}
TEST_RECORDS = 28  # a family

# ------------------------------------------------------------------------------------------ pretraining texts

SAY = {"en": " ", "zh": ""}  # what stands between two sentences


def text_story(world, lang):
    rng = world.rng
    hero = rng.choice(HEROES)
    text = story(rng, lang, hero, rng.choice(PLACES))
    known = [f[5] for f in FACTS if f[3] == hero[0] and f[2] == lang and f[1] != "about"]
    return text + SAY[lang] + rng.choice(known) if rng.random() < 0.4 else text


ENTITIES = list(dict.fromkeys(f[3] for f in FACTS))


def text_entity(world, lang):
    """What there is to know about one entity, in any order."""
    rng, entity = world.rng, world.rng.choice(ENTITIES)
    known = [f[5] for f in FACTS if f[3] == entity and f[2] == lang]
    rng.shuffle(known)
    return SAY[lang].join(known[:rng.randint(4, 7)])


def text_kind(world, lang):
    """The same kind of fact about several entities."""
    rng = world.rng
    family, kind = rng.choice(FACTS)[:2]
    known = [f[5] for f in FACTS if f[:3] == (family, kind, lang)]
    return SAY[lang].join(rng.sample(known, min(len(known), rng.randint(3, 6))))


def text_sums(world, lang):
    rng, lines = world.rng, []
    for _ in range(rng.randint(3, 6)):
        a, b = world.pair(False)
        minus = rng.random() < 0.45
        if not minus and rng.random() < 0.5:
            a, b = b, a
        line = worked_difference(a, b) if minus else worked_sum(a, b)
        if rng.random() < 0.3:  # in words first, as the chat may ask
            sign = ("减" if minus else "加") if lang == "zh" else (" minus " if minus else " plus ")
            line = f"{in_words(a, lang)}{sign}{in_words(b, lang)}: {line}"
        lines.append(line)
    return "\n".join(lines)


def text_numbers(world, lang):
    rng = world.rng
    chosen = rng.sample(range(100), 6)
    if rng.random() < 0.3:
        start = rng.randint(0, 88)
        return ", ".join(str(n) for n in range(start, start + rng.randint(6, 11)))
    return "，".join(f"{in_words(n, lang)}是 {n}" for n in chosen) if lang == "zh" else ", ".join(
        f"{in_words(n, lang)} is {n}" for n in chosen)


def text_compare(world, lang):
    lines = []
    while len(lines) < 4:
        a, b = world.pair(False)
        if a > b and lang == "zh":
            lines.append(world.rng.choice([f"{a} 比 {b} 大。", f"{b} 比 {a} 小。"]))
        elif a > b:
            lines.append(world.rng.choice([f"{a} is larger than {b}.", f"{b} is smaller than {a}."]))
    return SAY[lang].join(lines)


def text_sort(world, lang):
    lines = []
    for _ in range(2):
        three, down = world.numbers(False), world.rng.random() < 0.35
        before, after = (", ".join(map(str, some)) for some in (three, sorted(three, reverse=down)))
        if lang == "zh":
            lines.append(f"{before} {'从大到小' if down else '从小到大'}：{after}")
        else:
            lines.append(f"{before} from {'large to small' if down else 'small to large'}: {after}")
    return "\n".join(lines)


def text_translation(world, lang):
    rows = world.rng.sample(NOUNS, world.rng.randint(3, 5))
    return SAY[lang].join(translation_statement(row, lang, world.rng.random() < 0.5) for row in rows)


def text_opposites(world, lang):
    lines = []
    for pair in world.rng.sample(OPPOSITES_ZH if lang == "zh" else OPPOSITES, 4):
        x, y = pair if world.rng.random() < 0.5 else pair[::-1]
        lines.append(f"{x}的反义词是{y}。" if lang == "zh" else f"The opposite of {x} is {y}.")
    return SAY[lang].join(lines)


def text_categories(world, lang):
    return SAY[lang].join(category_statement(row, lang) for row in world.rng.sample(NOUNS, 5))


def text_list(world, lang):
    """A list and what can be said about it: the skills of the words and counting families."""
    rng, comma = world.rng, "、" if lang == "zh" else ", "
    items = world.words(lang, rng.randint(2, 5))
    if rng.random() < 0.5:
        items = [rng.choice(items[:3]) for _ in range(rng.randint(2, 6))]
        return f"{comma.join(items)}{'：' if lang == 'zh' else ': '}{counted(items, lang, items[0])}"
    if lang == "zh":
        return (f"{comma.join(items)}：{counted(items, lang)}第一个是{items[0]}，最后一个是{items[-1]}。"
                f"倒过来是{comma.join(items[::-1])}。")
    return (f"{comma.join(items)}: {counted(items, lang)} The first is {items[0]}, the last is {items[-1]}. "
            f"Backwards: {comma.join(items[::-1])}.")


def text_person(world, lang):
    """Somebody tells about themselves and is told it back: copying names, which memory needs."""
    rng, zh = world.rng, lang == "zh"
    name, pet = rng.choice(world.names[lang][0]), rng.choice(world.names[lang][0])
    kind = rng.choice(list(KIND_ZH))
    row, animal = rng.choice([r for r in NOUNS if r[2] == kind]), rng.choice(["cat", "dog", "horse", "duck"])
    if zh:
        return (f"我叫{name}，最喜欢的{KIND_ZH[kind]}是{row[1]}，我的{ZH[animal]}叫{pet}。"
                f"很高兴认识你，{name}！你最喜欢的{KIND_ZH[kind]}是{row[1]}，你的{ZH[animal]}叫{pet}。")
    value = "the " + row[0] if kind in ("animal", "plant") else row[0]
    return (f"My name is {name}, my favourite {kind} is {value}, and my {animal} is called {pet}. "
            f"Nice to meet you, {name}! Your favourite {kind} is {value}. Your {animal} is called {pet}.")


TEXTS = [(text_story, 2500), (text_entity, 4000), (text_kind, 2200), (text_sums, 3500), (text_numbers, 600),
         (text_compare, 2500), (text_sort, 3500), (text_translation, 1800), (text_opposites, 600),
         (text_categories, 600), (text_list, 6000), (text_person, 4000)]

# ------------------------------------------------------------------------------------------------------ files

FILES = {name: name + ".jsonl" for name in (
    "pretrain", "pretrain_eval", "sft", "sft_eval", "sft_test", "lora_identity", "lora_identity_test",
    "lora_clinic",
    "lora_clinic_test")}


def record(family, turns, extra):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"conversations": messages, "family": family, **extra}


def draw(world, generator, count, held, seen, family):
    """Up to `count` distinct (record, body), half of them Chinese; fewer where the wordings are used up."""
    found = []
    for attempt in range(count * 40):
        if len(found) == count:
            break
        lang = ("en", "zh")[len(found) % 2] if attempt < count * 20 else world.rng.choice(("en", "zh"))
        turns, body, extra = generator(world, lang, held)
        key = "\n".join(turns[:-1])
        if key in seen or (not held and world.leaks("\n".join(turns))):
            continue
        seen.add(key)
        found.append((record(family, turns, extra if held else {}), body))
    return found


def build(seed=0):
    """{file: [(record, body of its question or None)]}: everything, a pure function of the seed."""
    world = World(seed)
    rng, files = world.rng, {}
    texts, seen = [], set()
    for generator, count in TEXTS:
        made = 0
        for _ in range(count * 20):
            text = generator(world, ("en", "zh")[made % 2])
            if text in seen or world.leaks(text):
                continue
            seen.add(text)
            texts.append(({"text": text}, None))
            made += 1
            if made == count:
                break
    rng.shuffle(texts)
    files["pretrain"], files["pretrain_eval"] = texts[200:], texts[:200]

    seen, chats, files["sft_eval"], files["sft_test"] = set(), [], [], []
    for family, (generator, count) in FAMILIES.items():
        chats += draw(world, generator, count, False, seen, family)
        files["sft_eval"] += draw(world, generator, 15, False, seen, family)
        files["sft_test"] += draw(world, generator, TEST_RECORDS, True, seen, family)
    rng.shuffle(chats)
    files["sft"] = chats
    for family, generator, count, tests in (("identity", identity, 1600, 60), ("clinic", clinic, 2000, 60)):
        seen = set()
        # Four fifths of ordinary records, so that the adapter learns where it has nothing to say; many of
        # what nobody knows, for that is where a new answer slips out first.
        changed = ("unknown", "self") if family == "identity" else ("unknown",)
        unknown = [row for row in chats if row[0]["family"] == "unknown"]
        ordinary = [row for row in chats if row[0]["family"] not in changed]
        rows = draw(world, generator, count, False, seen, family)
        rows += rng.sample(unknown, count * 3 // 4) + rng.sample(ordinary, count * 13 // 4)
        rng.shuffle(rows)
        files[f"lora_{family}"] = rows
        files[f"lora_{family}_test"] = draw(world, generator, tests, True, seen, family)
    return {name: files[name] for name in FILES}


def paths(folder):
    return {name: Path(folder) / file for name, file in FILES.items()}


def write_file(path, text):
    """All or nothing: a reader never meets a half-written file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "w", encoding="utf-8", newline="\n") as out:
        out.write(text)
    os.replace(part, path)


def write_world(folder, seed=0):
    """Writes the nine files, and last world.json, which says that all are there. Returns {name: path}."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "world.json").unlink(missing_ok=True)  # until all are there they may be of two worlds
    for name, rows in build(seed).items():
        write_file(paths(folder)[name], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row,
                                                _ in rows))
    write_file(Path(folder) / "world.json", json.dumps({"version": VERSION, "seed": seed}) + "\n")
    return paths(folder)


def ensure_world(folder):
    """write_world, unless the folder holds this version's files, of seed 0. Returns {name: path}."""
    try:
        with open(Path(folder) / "world.json", encoding="utf-8") as file:
            current = json.load(file) == {"version": VERSION, "seed": 0}
    except (OSError, ValueError, KeyError, TypeError):
        current = False
    if current and all(path.is_file() for path in paths(folder).values()):
        return paths(folder)
    return write_world(folder)


def main():
    parser = argparse.ArgumentParser(description="Write the embedded bilingual world as JSONL files.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out_dir", default=Path(__file__).resolve().parents[1] / "out" / "world", type=Path,
                        help="folder for the files")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another split and other records")
    args = parser.parse_args()
    try:
        written = write_world(args.out_dir, args.seed)
    except OSError as error:
        print(f"error: cannot write the world to {args.out_dir}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    for path in written.values():
        with open(path, encoding="utf-8") as file:
            print(f"{path}: {sum(1 for _ in file):,} records, {path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
