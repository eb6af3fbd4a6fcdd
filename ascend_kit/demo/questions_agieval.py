# ruff: noqa: E501 - one line is one question
"""Sample questions in the style of AGIEval, written for this project: English and Chinese subsets.

One line is `question | right answer | wrong answers`; ` & ` joins several right answers, all of which are
accepted (the real law subset has such questions). AGIEval has a test split only. `math` is generative: its lines
are `question | answer`.
"""

AGIEVAL_ENGLISH = {
    "sat-en": """
Mia watered the seeds daily, and by June the yard was full of roses. What did Mia grow? | Roses | Corn | Grass | Pines
The old bridge shook, so Omar turned back. Why did Omar turn back? | It was unsafe | He was hungry | It rained | He was late
Lena read by candle because the lamp had failed. What had failed? | The lamp | The radio | The stove | The clock
The train left at nine; Paul came at ten. What did Paul do? | Missed it | Drove it | Sold it | Caught it
Snow closed the pass, and the village baked its own bread. What closed the pass? | Snow | Fire | Soldiers | Sand
Ada kept every letter in a tin box. Where were the letters? | In a tin box | On a shelf | At school | In a bank
The owl hunts at night and sleeps at noon. When does it sleep? | At noon | At night | In winter | At dusk
""",
    "sat-math": """
If x + 3 = 7, what is x? | 4 | 3 | 10 | 21
If 2x = 18, what is x? | 9 | 16 | 20 | 36
What is 15% of 200? | 30 | 15 | 20 | 45
A square has side 5. What is its area? | 25 | 10 | 20 | 15
What is the slope of y = 3x + 2? | 3 | 2 | 5 | 1
If x/4 = 6, what is x? | 24 | 10 | 2 | 12
What is the mean of 2, 4 and 9? | 5 | 4 | 9 | 15
""",
    "aqua-rat": """
A car goes 120 km in 2 hours. What is its speed? | 60 km/h | 50 km/h | 120 km/h | 240 km/h | 30 km/h
Three pens cost 9 coins. What do five pens cost? | 15 | 12 | 18 | 27 | 45
A shirt of 40 coins is sold at 10% off. What is the price? | 36 | 30 | 38 | 44 | 4
Two workers dig a hole in 6 days. How long does one need? | 12 days | 3 days | 6 days | 8 days | 18 days
The sum of two numbers is 20, the difference 4. Which is larger? | 12 | 8 | 16 | 14 | 10
A tank loses 5 litres an hour. What is lost in 7 hours? | 35 litres | 12 litres | 30 litres | 40 litres | 57 litres
A box holds 6 red and 4 blue balls. What share is blue? | 2/5 | 3/5 | 1/4 | 1/2 | 2/3
""",
    "lsat-lr": """
All cats are mammals. Tom is a cat. What follows? | Tom is a mammal | Tom is a dog | All mammals are cats | Tom is old | None
If it rains, the match is off. The match is on. What follows? | It does not rain | It rains | It snows | It is windy | None
Sales rose after the advert, so the advert worked. What is assumed? | No other cause | Prices fell | Ads are cheap | Sales fell | None
Only members vote. Ann voted. What follows? | Ann is a member | Ann is not a member | Ann lost | Ann won | None
No fish can fly. A pike is a fish. What follows? | A pike cannot fly | A pike can fly | Fish swim | Birds fly | None
Every key opens a door; this opens no door. What follows? | It is not a key | It is a key | It is a door | It is a lock | None
Some poets are teachers. What must be true? | Some teachers are poets | All teachers are poets | No poet teaches | All poets teach | None
""",
    "logiqa-en": """
Ann is taller than Ben, and Ben is taller than Carl. Who is the shortest? | Carl | Ben | Ann | Nobody
Dora sits left of Eve, and Fay sits right of Eve. Who sits in the middle? | Eve | Dora | Fay | Nobody
If today is Monday, which day is the day after tomorrow? | Wednesday | Tuesday | Thursday | Sunday
All roses are flowers. Some flowers fade. Which must be true? | Roses are flowers | All roses fade | No rose fades | Flowers are roses
Gus lies always. Gus says the box is empty. What is the box? | Not empty | Empty | Broken | Red
Hal is older than Ivy; Jan is older than Hal. Who is the oldest? | Jan | Hal | Ivy | Unknown
Each bird in the cage is green. Kiki is yellow. Where is Kiki? | Outside the cage | In the cage | In a tree | Asleep
""",
    "gaokao-english": """
She ___ to school every day. | goes | go | going | gone
They ___ football when it began to rain. | were playing | play | plays | are playing
He has lived here ___ 2010. | since | for | from | at
This book is ___ than that one. | better | good | best | well
I look forward to ___ you. | seeing | see | saw | seen
If I ___ you, I would wait. | were | am | be | being
The letter was ___ by Jack. | written | write | wrote | writing
""",
}

AGIEVAL_CHINESE = {
    "gaokao-geography": """
一年中北半球白昼最长的节气是 | 夏至 | 冬至 | 春分 | 秋分
我国东部夏季盛行的风是 | 东南季风 | 西北季风 | 西风 | 东北信风
板块张裂处常形成 | 裂谷 | 山脉 | 海沟 | 三角洲
河流入海口常见的地貌是 | 三角洲 | 冲积扇 | 峡谷 | 瀑布
地球上最大的水体是 | 海洋 | 冰川 | 湖泊 | 河流
热带雨林的气候特点是 | 全年高温多雨 | 全年干旱 | 冬冷夏热 | 全年严寒
黄土高原最突出的环境问题是 | 水土流失 | 酸雨 | 赤潮 | 台风
""",
    "gaokao-history": """
商鞅变法发生在哪个诸侯国 | 秦国 | 齐国 | 楚国 | 燕国
丝绸之路开辟于哪个朝代 | 西汉 | 东周 | 唐朝 | 宋朝
文艺复兴最早兴起于 | 意大利 | 英国 | 法国 | 德国
工业革命最早开始于 | 英国 | 法国 | 美国 | 俄国
领导洋务运动的是 | 洋务派 | 维新派 | 革命派 | 顽固派
新文化运动的口号是民主与 | 科学 | 自由 | 平等 | 富强
联合国成立于 | 1945年 | 1919年 | 1939年 | 1950年
""",
    "gaokao-biology": """
细胞进行有氧呼吸的主要场所是 | 线粒体 | 叶绿体 | 核糖体 | 高尔基体
合成蛋白质的细胞器是 | 核糖体 | 中心体 | 液泡 | 溶酶体
遗传信息的主要载体是 | DNA | 脂肪 | 糖类 | 蛋白质
光合作用的场所是 | 叶绿体 | 线粒体 | 细胞核 | 内质网
豌豆杂交实验的完成者是 | 孟德尔 | 达尔文 | 摩尔根 | 巴斯德
提出自然选择学说的是 | 达尔文 | 孟德尔 | 拉马克 | 林奈
生态系统中的分解者主要是 | 细菌和真菌 | 绿色植物 | 食草动物 | 食肉动物
""",
    "logiqa-zh": """
甲比乙高，乙比丙高。最矮的是 | 丙 | 乙 | 甲 | 无法确定
所有的金属都导电，铜是金属。由此可知 | 铜导电 | 铜不导电 | 导电的都是铜 | 金属都是铜
如果下雨就不去爬山。今天去爬山了。由此可知 | 没有下雨 | 下雨了 | 下雪了 | 刮风了
小王总说谎，他说门开着。由此可知 | 门关着 | 门开着 | 没有门 | 门坏了
今天是星期五，后天是 | 星期日 | 星期六 | 星期一 | 星期四
有的学生是运动员。由此可知 | 有的运动员是学生 | 学生都是运动员 | 没有运动员 | 运动员都是学生
只有会员才能借书。小李借了书。由此可知 | 小李是会员 | 小李不是会员 | 小李没借书 | 书丢了
""",
    "jec-qa-kd": """
下列属于法律的基本特征的是 | 国家强制力保证 & 由国家制定 | 只约束穷人 | 由商人制定
下列属于公民基本义务的是 | 依法纳税 & 遵守宪法 | 经商 | 旅游
我国的根本大法是 | 宪法 | 刑法 | 民法典 | 公司法
下列属于刑罚主刑的是 | 拘役 & 有期徒刑 | 罚款 | 记过
我国完全民事行为能力的年龄起点是 | 十八周岁 | 八周岁 | 十四周岁 | 二十周岁
下列可以作为证据的是 | 书证 & 物证 | 猜测 | 传说
我国的最高审判机关是 | 最高人民法院 | 公安部 | 司法部 | 最高人民检察院
""",
}

AGIEVAL_CLOZE = {
    "math": """
What is 6 times 7? | 42
What is 9 squared? | 81
What is 100 minus 37? | 63
What is the square root of 144? | 12
What is 5 factorial? | 120
What is 3 cubed? | 27
What is half of 90? | 45
"""
}
