"""Sample questions in the style of MMLU, written for this project: six subjects, nineteen questions each.

One line is `question | right answer | three wrong answers`; the position of the right answer is assigned by
`datasets.py`. The first five lines of a subject become its dev split (shots), the next two its validation
split and the remaining twelve its test split.
"""

MMLU_QUESTIONS = {
    "high_school_geography": """
Which is the largest ocean? | Pacific | Atlantic | Indian | Arctic
Which river flows through Cairo? | Nile | Congo | Niger | Zambezi
Which line divides the Earth into north and south? | Equator | Prime meridian | Tropic of Cancer | Date line
Which continent has the most people? | Asia | Africa | Europe | South America
What is the capital of Canada? | Ottawa | Toronto | Montreal | Vancouver
Which desert covers most of northern Africa? | Sahara | Gobi | Kalahari | Atacama
What is the capital of Australia? | Canberra | Sydney | Melbourne | Perth
Which is the highest mountain above sea level? | Everest | Kilimanjaro | Mont Blanc | Denali
Which country has the longest coastline? | Canada | Chile | Norway | Japan
Which strait separates Europe from Africa? | Gibraltar | Bering | Malacca | Hormuz
Which canal joins the Red Sea and the Mediterranean? | Suez | Panama | Kiel | Corinth
What is the smallest continent? | Australia | Europe | Antarctica | South America
Which city lies on two continents? | Istanbul | Athens | Moscow | Lisbon
What do we call land almost surrounded by water? | Peninsula | Plateau | Isthmus | Delta
Which layer of rock carries ground water? | Aquifer | Mantle | Moraine | Basalt
Which mountains run along western South America? | Andes | Alps | Rockies | Urals
Which lake is the deepest in the world? | Baikal | Victoria | Superior | Geneva
What is the capital of Brazil? | Brasilia | Rio de Janeiro | Recife | Salvador
What is moving people from villages to cities called? | Urbanisation | Erosion | Irrigation | Subsidence
""",
    "astronomy": """
Which planet is closest to the Sun? | Mercury | Venus | Earth | Mars
What is at the centre of the solar system? | The Sun | The Earth | Jupiter | The Moon
Which planet is the largest? | Jupiter | Saturn | Neptune | Earth
What force keeps planets in orbit? | Gravity | Friction | Magnetism | Pressure
Which planet is known for its bright rings? | Saturn | Mars | Venus | Mercury
Which galaxy do we live in? | Milky Way | Andromeda | Sombrero | Whirlpool
What is a group of stars forming a picture called? | Constellation | Comet | Crater | Corona
Which planet is called the red planet? | Mars | Jupiter | Venus | Uranus
What causes the phases of the Moon? | Changing sunlit view | Clouds | Earth's rings | Solar wind
Which planet is the hottest? | Venus | Mercury | Mars | Neptune
What do stars fuse for most of their lives? | Hydrogen | Iron | Carbon | Oxygen
What is a light year a measure of? | Distance | Time | Brightness | Mass
Which body was called a planet until 2006? | Pluto | Titan | Ceres | Europa
Which planet rotates on its side? | Uranus | Earth | Saturn | Mars
What is a small icy body with a tail? | Comet | Quasar | Pulsar | Nebula
Which blocks the Sun in a solar eclipse? | The Moon | Venus | Mercury | A cloud
What is left after a massive star collapses? | Black hole | Red giant | Asteroid | Sunspot
How long does the Earth take to orbit the Sun? | One year | One day | One month | Ten years
What colour are the hottest stars? | Blue | Red | Orange | Yellow
""",
    "anatomy": """
Which organ pumps blood? | Heart | Liver | Lung | Kidney
Which organ filters urine from blood? | Kidney | Stomach | Spleen | Heart
Where does gas exchange take place? | Alveoli | Trachea | Larynx | Ribs
What is the longest bone? | Femur | Tibia | Radius | Ulna
Which organ makes bile? | Liver | Pancreas | Bladder | Colon
Which organ makes insulin? | Pancreas | Thyroid | Kidney | Heart
Which part of the eye gives it colour? | Iris | Lens | Retina | Cornea
Which muscle drives breathing? | Diaphragm | Biceps | Deltoid | Calf
Which vessels carry blood away from the heart? | Arteries | Veins | Nerves | Tendons
What joins muscle to bone? | Tendon | Ligament | Cartilage | Fascia
What joins bone to bone? | Ligament | Tendon | Nerve | Artery
Which is the largest organ of the body? | Skin | Liver | Brain | Lung
Which part of the brain controls balance? | Cerebellum | Retina | Thalamus | Pons
How many chambers has the human heart? | Four | Two | Three | Five
Which bone protects the brain? | Skull | Sternum | Pelvis | Patella
Where is the smallest bone? | Ear | Hand | Foot | Nose
Which cells carry oxygen? | Red blood cells | Platelets | Neurons | White blood cells
Which tube leads from throat to stomach? | Oesophagus | Trachea | Ureter | Aorta
Which gland lies in the neck? | Thyroid | Adrenal | Pituitary | Pineal
""",
    "high_school_computer_science": """
How many bits are in a byte? | 8 | 4 | 16 | 32
Which structure is last in, first out? | Stack | Queue | Tree | Graph
What is binary 101 in decimal? | 5 | 3 | 4 | 6
Which part executes instructions? | CPU | Disk | Screen | Printer
What repeats a block of code? | Loop | Comment | Variable | String
Which structure is first in, first out? | Queue | Stack | Heap | Set
What is decimal 8 in binary? | 1000 | 111 | 1010 | 1100
Which search halves the list at each step? | Binary search | Linear search | Random search | Full scan
What does RAM store? | Running data | Paper files | Power | Sound waves
Which value can a boolean hold? | True | Seven | Hello | 3.5
What turns source code into machine code? | Compiler | Browser | Router | Monitor
Which sort swaps neighbouring items? | Bubble sort | Merge sort | Radix sort | Heap sort
What is a function that calls itself? | Recursive | Static | Abstract | Virtual
Which gate inverts its input? | NOT | AND | OR | XOR
What is hexadecimal F in decimal? | 15 | 10 | 16 | 14
Which language styles web pages? | CSS | SQL | C | Fortran
Which language queries databases? | SQL | HTML | CSS | Assembly
What is an error in a program called? | Bug | Patch | Port | Cookie
What hides data behind a key? | Encryption | Sorting | Indexing | Printing
""",
    "nutrition": """
Which vitamin comes from sunlight? | Vitamin D | Vitamin C | Vitamin K | Vitamin B12
Which mineral builds bones? | Calcium | Sodium | Iodine | Copper
Which nutrient builds muscle? | Protein | Fibre | Sugar | Water
Which fruit is rich in vitamin C? | Orange | Banana | Coconut | Olive
What is the main sugar in milk? | Lactose | Sucrose | Fructose | Maltose
Which mineral prevents anaemia? | Iron | Zinc | Fluoride | Sodium
Which nutrient gives most energy per gram? | Fat | Protein | Starch | Fibre
Which disease comes from lack of vitamin C? | Scurvy | Rickets | Goitre | Beriberi
Which mineral does the thyroid need? | Iodine | Iron | Calcium | Copper
Which vitamin helps night vision? | Vitamin A | Vitamin E | Vitamin D | Vitamin K
What is table salt made of? | Sodium chloride | Calcium oxide | Iron sulfate | Zinc oxide
Which food is rich in fibre? | Oats | Butter | Cheese | Eggs
Which disease comes from lack of vitamin D? | Rickets | Scurvy | Measles | Gout
Which vitamin helps blood to clot? | Vitamin K | Vitamin A | Vitamin C | Vitamin E
Which nutrient is not digested by people? | Fibre | Starch | Fat | Protein
What are proteins made of? | Amino acids | Fatty acids | Sugars | Minerals
Which food is the richest in protein? | Lentils | Lettuce | Honey | Apples
Which oil comes from a fruit? | Olive oil | Corn oil | Soybean oil | Fish oil
Which unit measures food energy? | Kilocalorie | Litre | Newton | Volt
""",
    "high_school_world_history": """
Who built the pyramids of Giza? | Egyptians | Romans | Vikings | Aztecs
Which empire did Julius Caesar serve? | Rome | Persia | China | Mali
Where did the Industrial Revolution begin? | Britain | Russia | Spain | Egypt
Which wall fell in 1989? | Berlin Wall | Great Wall | Hadrian's Wall | Western Wall
Who sailed to the Americas in 1492? | Columbus | Magellan | Cook | Drake
Which people built Machu Picchu? | Inca | Maya | Greeks | Mongols
Who led the Mongol Empire first? | Genghis Khan | Attila | Saladin | Napoleon
Which route carried silk from China? | Silk Road | Amber Road | Spice Canal | Royal Mile
In which city did democracy first grow? | Athens | Sparta | Troy | Carthage
Who was the first emperor of Rome? | Augustus | Nero | Trajan | Hadrian
Which war ended in 1945? | Second World War | Crimean War | Boer War | Cold War
Who invented movable metal type in Europe? | Gutenberg | Galileo | Newton | Luther
Which plague struck Europe in 1347? | Black Death | Cholera | Influenza | Smallpox
Who led India to independence by peaceful protest? | Gandhi | Nehru | Akbar | Ashoka
Which country stormed the Bastille in 1789? | France | Austria | Poland | Sweden
Which empire ruled from Constantinople after 1453? | Ottoman | Roman | Inca | Mughal
Who was freed from prison in 1990 in South Africa? | Mandela | Tutu | Biko | Kenyatta
Which ship carried the Pilgrims in 1620? | Mayflower | Victoria | Beagle | Titanic
Which writing did the Sumerians use? | Cuneiform | Hieroglyphs | Runes | Latin
""",
}
