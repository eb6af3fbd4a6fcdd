"""Small tables of general knowledge; `pages.py` turns them into pages, questions and prompts."""

# name | capital | continent | language | currency | what it is known for
COUNTRIES = """
France | Paris | Europe | French | euro | wine and cheese
Germany | Berlin | Europe | German | euro | cars and machines
Spain | Madrid | Europe | Spanish | euro | olives and oranges
Italy | Rome | Europe | Italian | euro | art and opera
Portugal | Lisbon | Europe | Portuguese | euro | cork and ships
Poland | Warsaw | Europe | Polish | zloty | coal and amber
Sweden | Stockholm | Europe | Swedish | krona | forests and steel
Greece | Athens | Europe | Greek | euro | islands and temples
Norway | Oslo | Europe | Norwegian | krone | fjords and fish
Hungary | Budapest | Europe | Hungarian | forint | hot springs and music
Japan | Tokyo | Asia | Japanese | yen | trains and gardens
China | Beijing | Asia | Chinese | yuan | silk and tea
India | New Delhi | Asia | Hindi | rupee | spices and cotton
Thailand | Bangkok | Asia | Thai | baht | rice and temples
Vietnam | Hanoi | Asia | Vietnamese | dong | coffee and rice
Turkey | Ankara | Asia | Turkish | lira | carpets and figs
Egypt | Cairo | Africa | Arabic | pound | pyramids and cotton
Kenya | Nairobi | Africa | Swahili | shilling | tea and wildlife
Morocco | Rabat | Africa | Arabic | dirham | leather and markets
Ethiopia | Addis Ababa | Africa | Amharic | birr | coffee and highlands
Brazil | Brasilia | South America | Portuguese | real | coffee and forests
Peru | Lima | South America | Spanish | sol | wool and mountains
Chile | Santiago | South America | Spanish | peso | copper and vineyards
Canada | Ottawa | North America | English | dollar | maple and lakes
"""

# name | symbol | atomic number | state at room temperature | use
ELEMENTS = """
Hydrogen | H | 1 | gas | rocket fuel
Helium | He | 2 | gas | balloons
Carbon | C | 6 | solid | steel making
Nitrogen | N | 7 | gas | fertiliser
Oxygen | O | 8 | gas | breathing apparatus
Neon | Ne | 10 | gas | bright signs
Sodium | Na | 11 | solid | street lamps
Aluminium | Al | 13 | solid | aircraft
Silicon | Si | 14 | solid | computer chips
Sulfur | S | 16 | solid | rubber making
Chlorine | Cl | 17 | gas | clean water
Calcium | Ca | 20 | solid | cement
Iron | Fe | 26 | solid | bridges
Copper | Cu | 29 | solid | electric wires
Silver | Ag | 47 | solid | mirrors
Tin | Sn | 50 | solid | solder
Gold | Au | 79 | solid | jewellery
Mercury | Hg | 80 | liquid | old thermometers
"""

# name | class | food | home | young
ANIMALS = """
lion | mammal | meat | savanna | cub
tiger | mammal | meat | forest | cub
horse | mammal | grass | plain | foal
whale | mammal | krill | ocean | calf
bat | mammal | insects | cave | pup
eagle | bird | meat | mountain | eaglet
duck | bird | water plants | lake | duckling
penguin | bird | fish | polar coast | chick
frog | amphibian | insects | pond | tadpole
snake | reptile | mice | desert | snakelet
shark | fish | fish | ocean | pup
bee | insect | nectar | hive | larva
goat | mammal | leaves | hill | kid
swan | bird | water plants | river | cygnet
"""

# name | place from the Sun | kind | moons | known for
PLANETS = """
Mercury | first | rocky | no moons | its short year
Venus | second | rocky | no moons | its thick hot air
Earth | third | rocky | one moon | its oceans and life
Mars | fourth | rocky | two moons | its red dust
Jupiter | fifth | gas | many moons | its great red spot
Saturn | sixth | gas | many moons | its bright rings
Uranus | seventh | icy | many moons | its tilted axis
Neptune | eighth | icy | many moons | its fast winds
"""


def rows(table: str) -> list[list[str]]:
    """The lines of a table, split at the bars."""
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
