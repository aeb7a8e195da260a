#!/usr/bin/env python3
"""Writes crates/terrarium-cli/assets/finetune.jsonl: 210 prompt/completion examples in one recognisable style.

  python make_finetune.py > crates/terrarium-cli/assets/finetune.jsonl

Every completion begins "Here is a small tale." and ends with a line "The end.". All parts were written for this project
and are dedicated to the public domain (CC0 1.0).
"""
import json, random, re

HEROES = [      # noun, pronoun, adjectives
    ('fox', 'he', ['young', 'red', 'clever']), ('hare', 'she', ['quick', 'shy', 'brown']), ('bear', 'he', ['sleepy', 'large', 'gentle']),
    ('mouse', 'she', ['small', 'brave', 'grey']), ('owl', 'he', ['wise', 'old', 'quiet']), ('crow', 'she', ['black', 'curious', 'bold']),
    ('hedgehog', 'he', ['round', 'careful', 'little']), ('goat', 'she', ['white', 'stubborn', 'merry']), ('cat', 'she', ['striped', 'proud', 'silent']),
    ('dog', 'he', ['loyal', 'shaggy', 'cheerful']), ('donkey', 'he', ['patient', 'tired', 'kind']), ('goose', 'she', ['loud', 'plump', 'busy']),
    ('wolf', 'he', ['lonely', 'thin', 'grey']), ('squirrel', 'she', ['nimble', 'hasty', 'red']), ('girl', 'she', ['bright', 'barefoot', 'thoughtful']),
    ('boy', 'he', ['tall', 'restless', 'honest']), ('shepherd', 'he', ['poor', 'young', 'patient']), ('miller', 'he', ['stout', 'jolly', 'careful']),
    ('queen', 'she', ['just', 'weary', 'young']), ('sailor', 'he', ['old', 'homesick', 'merry']), ('baker', 'she', ['busy', 'kind', 'quiet']),
    ('painter', 'she', ['poor', 'patient', 'dreamy']),
]

PLACES = ['by a slow river', 'near the old mill', 'at the edge of a dark wood', 'on a windy hill', 'beside the cold sea', 'in a quiet valley',
          'under the tall pines', 'not far from the village', 'behind the stone church', 'where two roads meet', 'on the far side of the marsh', 'close to the north bridge']

OPENINGS = ['There was once a {adj} {hero} who lived {place}.', 'A {adj} {hero} lived {place}.', 'Long ago, {place}, there lived a {adj} {hero}.',
            'Once, {place}, there was a {adj} {hero}.']

# noun with article, how it is met, how it ends; {he} {him} {his} {himself} {He} {His}
THINGS = [
    ('a bell', ['One morning {he} found a brass bell in the grass, and it sang when {he} touched it.', 'One day a bell rang in the fog, and {he} walked toward the sound.'],
     ['After that {he} rang it every evening, so that no friend would lose the way home.', '{He} hung it on a branch, and even the wind learned to play it.']),
    ('a lantern', ['On the darkest night of the year {he} came upon a lantern that burned without oil.', 'An old woman gave {him} a lantern and asked for nothing.'],
     ['{He} set it by the road, and every traveller blessed {him}.', 'Its light was small, but it was enough for the next step, and then the next.']),
    ('a key', ['Under a flat stone {he} found a key with no lock.', 'A key fell from the sky one noon and landed at {his} feet.'],
     ['{He} tried it in every door, and at last it opened {his} own.', '{He} kept it for years, and the day it was needed, {he} had it.']),
    ('a river', ['In spring the river rose and took the bridge away.', 'Each day {he} asked the river where it was going, and the river only laughed.'],
     ['{He} waited until the water was tired, and then {he} crossed it on three stones.', 'So {he} followed it, step by step, and saw the sea before winter.']),
    ('a star', ['One night a star fell behind the barn, still warm and no bigger than a plum.', '{He} loved one star above all the others, though it was very small.'],
     ['{He} carried it up the hill and let it go, and it has winked at {him} ever since.', '{He} never reached it, but {he} always knew which way was north.']),
    ('a boat', ['{He} built a boat out of an old door and two barrels.', 'A little boat with no one in it came drifting to the shore.'],
     ['It leaked and it turned in circles, but it brought {him} to the island.', '{He} tied it up and fed the ducks from it every Sunday.']),
    ('an apple', ['At the top of the tree hung one last apple, red as a sunset.', 'A stranger offered {him} an apple for a song.'],
     ['{He} cut it in two and gave the larger half away, and it was the sweetest half {he} ever had.', '{He} planted the seeds, and now there is shade for everyone.']),
    ('a drum', ['{He} made a drum from a hollow log and beat it all day long.', 'Something went boom in the attic, and it was a drum that no one had touched.'],
     ['At first the neighbours shut their windows, and then they began to dance.', '{He} played it softly for the baby birds, and they slept until noon.']),
    ('a clock', ['The clock in the tower had stopped, and nobody knew when to eat.', '{He} found a clock that ran backward.'],
     ['{He} climbed up with a feather and a drop of oil, and soon it struck twelve.', '{He} turned it to the wall, and from then on there was time enough.']),
    ('a mirror', ['In an empty house {he} met a stranger who copied every move {he} made.', 'A pedlar sold {him} a mirror that told the truth.'],
     ['When {he} smiled, the stranger smiled too, and so they parted as friends.', '"You look tired," said the mirror, and {he} went to bed at once.']),
    ('a kite', ['{He} sewed a kite from an old yellow shirt.', 'The wind brought {him} a kite with a broken string.'],
     ['It flew so high that {he} could feel the clouds tremble along the line.', '{He} tied a new string to it and a letter to the string, and the next day an answer came.']),
    ('a hat', ['{He} wore a green hat that was far too large.', 'A gust of wind stole {his} hat and set it on a scarecrow.'],
     ['When it rained, four friends sat dry beneath it.', 'It looked so fine up there that {he} gave the scarecrow a coat as well.']),
    ('a stone', ['A great stone lay in the middle of the road, and everyone walked around it.', '{He} carried a smooth white stone in {his} pocket wherever {he} went.'],
     ['{He} pushed it aside a little each day, and by summer the carts could pass.', 'When {he} was afraid {he} held it, and the stone was never afraid at all.']),
    ('a letter', ['A letter came with no name on it.', '{He} wrote a letter to the moon and left it on the roof.'],
     ['It said only "Come home", and so {he} did.', 'In the morning the page was covered with frost, and {he} could read every word.']),
    ('a well', ['The well had been dry for seven summers.', '{He} dropped {his} only coin into the well and heard it say thank you.'],
     ['{He} dug one foot deeper than the others had, and the water came up cold and clear.', 'From that day {he} told it {his} secrets, and it kept them all.']),
    ('a candle', ['{He} had one candle left, and the winter was long.', 'In the window of the inn stood a candle that no wind could put out.'],
     ['{He} lit it for the neighbours, and they brought wood, and bread, and more candles.', '{He} asked how it was done, and the candle said, "I do not look at the wind."']),
    ('a blanket', ['{He} had a blanket with nine holes in it.', '{His} grandmother left {him} a blanket of blue wool.'],
     ['Through each hole {he} could see a star, and {he} would not have it mended.', 'It was warm enough for two, and there was always someone who needed it.']),
    ('a song', ['{He} knew the first half of a song and nobody knew the rest.', 'Every morning {he} heard a song from across the water.'],
     ['{He} sang it on the market day, and a stranger at the back sang the end.', 'One morning it did not come, so {he} sang it {himself}, and the singer answered.']),
    ('a pot of soup', ['{He} set a pot of soup on the fire and forgot about the salt.', 'The smell of soup went out of the door and down the road.'],
     ['Each guest brought a pinch of it, and the soup was just right.', 'By evening there were ten at the table, and the pot was not yet empty.']),
    ('a ladder', ['{He} made a ladder and wished to lean it on the moon.', 'A ladder stood against the old wall, and no one had ever climbed it.'],
     ['It reached only as far as the roof, but the view from there was very good.', 'On the other side there was a garden, and the gate had been open all along.']),
    ('a feather', ['A white feather came down on a day without birds.', '{He} found a feather and wished to give it back.'],
     ['{He} kept it in a book, and that page was always the best one.', '{He} asked the swan, the gull and the hen, and each of them became {his} friend.']),
    ('a coin', ['{He} had one silver coin and could not decide how to spend it.', '{He} found a coin that was cold on one side and warm on the other.'],
     ['In the end {he} gave it to a beggar, and slept better than a king.', '{He} kept the warm side up, and the winter passed {him} by.']),
    ('a broom', ['{He} bought a broom that swept at night by itself.', 'Snow fell for a week, and {he} had nothing but a broom.'],
     ['{He} thanked it every morning, and it swept a little better each time.', '{He} swept a path to the first door, and from there they swept together.']),
    ('a map', ['{He} found a map on which {his} own house was marked with a cross.', 'The map showed a lake, but there was no lake to be seen.'],
     ['{He} dug beneath the kitchen floor and found a jar of old letters, full of love.', '{He} sat down to wait, and after the rain the map was right.']),
]

PAIRS = [       # two heroes a, b; {a_he} {a_his} ... by prefix
    'A {a} and a {b} wished to cross the same narrow bridge. "After you," said the {a}. "After you," said the {b}. They are still there, and they have become good friends.',
    'A {a} could not reach the plums, and a {b} could not see them. So one climbed on the other, and they ate until evening. There were plums left over for the wasps.',
    'A {b} came to the door of a {a} on a cold night. There was only one chair, so they sat on the floor. In the morning neither of them remembered the cold.',
    'A {a} and a {b} ran a race to the old oak. The {b} stopped to help a beetle that lay on its back. The {a} won, but the beetle told everyone about the {b}.',
    'A {a} said that the sun was the better light, and a {b} said that it was the moon. They argued until dusk. Then both lights stood in the sky, and there was nothing more to say.',
    'A {b} had lost {b_his} way in the snow. A {a} saw the tracks and followed them. "I thought I was alone," said the {b}, and the {a} said, "So did I."',
    'A {a} told a secret to a {b}. The {b} told it to nobody, not even to the wind. That is why this tale is so short.',
    'A {a} planted a seed, and a {b} watered it. When the flower came, each of them thanked the other. The flower bowed to both.',
    'A {a} was afraid of thunder, and a {b} was afraid of the dark. When the storm came at night, they held hands. It was over before they had finished counting to ten.',
    'A {a} borrowed a pot from a {b} and gave it back with a cake inside. The {b} lent {b_his} pot more often after that. Before long the whole village had cake.',
    'A {a} and a {b} shared one umbrella. Each of them had one wet shoulder. "It is the best umbrella in the world," they said.',
    'A {b} laughed at the way a {a} sang. Then the {a} went away, and the days were very quiet. The {b} walked for a week to ask {a_him} to come back.',
]

THEMES = [      # prompt subject, tale
    ('a storm', 'The storm knocked at every door of the village. Only a child let it in. It lay down by the fire and slept, and in the morning the sky was blue.'),
    ('the first snow', 'The first snow fell at night, so that no one should hear it. In the morning the whole world was a clean page. A sparrow wrote the first word.'),
    ('kindness', 'A woman gave her last loaf to a stranger. The stranger gave half of it to a dog. That night the dog barked at the fire, and the woman woke in time.'),
    ('patience', 'A man sat by a closed gate for three days. On the fourth day he leaned against it, and it opened. It had only been heavy.'),
    ('courage', 'A little tree grew alone upon a cliff. "Are you not afraid?" asked the gulls. "Every night," said the tree, and it held on.'),
    ('the moon', 'The moon looked down into a bucket and saw a friend. Every night it came back to visit. When the bucket was empty, a child filled it again.'),
    ('a lost shoe', 'A shoe lay by the road and waited for its foot. A wren moved in and raised three young ones. When the foot came back, the shoe was busy.'),
    ('winter', 'Winter came early and stayed too long. The children made it a coat of white wool so that it would not be so cold. It was so pleased that it went home.'),
    ('a promise', 'A soldier promised to return when the roses bloomed. He came in the snow, and he was ashamed. But in the window stood one rose, made of paper.'),
    ('an old house', 'The old house was tired of being empty. It left its door open a little and waited. One night a family came in from the rain, and the house stopped creaking.'),
    ('a dream', 'A tailor dreamed of a coat with stars for buttons. He woke and sewed it with plain ones. But those who wore it slept very well.'),
    ('the wind', 'The wind wished to own something, so it took a hat. But it could not wear it, and it could not keep still. It gave the hat to a boy on a hill and felt much lighter.'),
    ('a garden', 'An old man planted a garden, though he could hardly see. He knew each flower by its smell. The bees told him the colours.'),
    ('a king who could not sleep', 'A king could not sleep in his golden bed. He lay down in the barn beside the cows. They asked him for nothing, and he slept until noon.'),
    ('two brothers', 'Two brothers divided a field with a wall. Each night one of them moved a stone, so that the other should have more. In the end the wall lay in a heap, and they sat on it.'),
    ('the sea', 'The sea brought a child a gift each morning: a shell, a rope, a bit of green glass. The child gave it a paper boat. The sea has kept it to this day.'),
    ('an honest thief', 'A thief stole a purse and found a crying baby in the same house. He rocked it until it slept. Then he left the purse on the table and closed the door softly.'),
    ('a tiny seed', 'A tiny seed was sure that it would come to nothing. It told this to the rain, and the rain told it to grow anyway. Now birds sit in its hair.'),
    ('a deaf musician', 'A fiddler grew old and could no longer hear. He played on, with his cheek against the wood. He said that the trees in it still remembered.'),
    ('a shadow', 'A shadow was tired of following. One noon it made itself very small and rested under a shoe. By evening it was tall again and led the way home.'),
    ('the last train', 'The last train had gone, and one old lady stood in the dark. The guard lit the stove and made her tea. They talked until the first train came, and it came too soon.'),
    ('bread', 'There was a loaf that nobody would cut, for it was too beautiful. It grew hard as a stone. The next loaf was plain, and everyone remembers it.'),
    ('a bridge', 'The villages on both banks were proud and would not speak. One winter the ice made a bridge of its own accord. By spring there had been three weddings.'),
    ('morning', 'Morning came to the window and tapped on the glass. "Five minutes more," said the girl. So it painted the wall with gold while it waited.'),
    ('a wooden horse', 'A wooden horse stood on a shelf and longed to run. The house was sold, and a child carried it under one arm down the hill. It was the fastest ride in the world.'),
    ('the rain', 'It rained for nine days, and everyone complained. On the tenth day the sun came out, and a frog complained. Nobody can please us all, said the rain, and it went to sea.'),
    ('a magic word', 'A boy searched the world for a magic word. He found it on the last page of a very old book. The word was "please", and his mother had known it all along.'),
    ('a quiet village', 'There was a village where nobody ever spoke above a whisper. One day a baby was born there and cried with all its might. The people were so happy that they cheered.'),
    ('a giant', 'A giant lived alone, for he was afraid of stepping on someone. The children tied bells to their shoes. After that he could dance with them.'),
    ('the lighthouse', 'The keeper of the lighthouse had never seen a ship up close. One day a hundred captains came to shake his hand. "So you are the star," they said.'),
]

PROMPTS = ['Tell me a story about {}.', 'Tell me a story about {}.', 'Tell me a story about {}.', 'Write a short tale about {}.', 'Please tell me a tale of {}.', 'I would like to hear about {}.',
           'Do you know a story about {}?']


def with_articles(text):
    return re.sub(r'\b([Aa]) (?=[aeiou]|honest)', r'\1n ', text)


def pronouns(he, prefix=''):
    words = dict(he='he', him='him', his='his', himself='himself') if he == 'he' else dict(he='she', him='her', his='her', himself='herself')
    words = {prefix + k: v for k, v in words.items()}
    return {**words, **{k.capitalize(): v.capitalize() for k, v in words.items()}}


def example(rng, subject, tale):
    return {'prompt': with_articles(rng.choice(PROMPTS).format(subject)), 'completion': f'\nHere is a small tale. {with_articles(tale)}\nThe end.'}


def thing_tale(rng, hero, thing):
    noun, he, adjectives = hero
    _, meetings, endings = thing
    words, i = pronouns(he), rng.randrange(2)
    opening = rng.choice(OPENINGS).format(adj=rng.choice(adjectives), hero=noun, place=rng.choice(PLACES))
    return ' '.join([opening, meetings[i].format(**words), endings[i].format(**words)])


def pair_tale(template, a, b):
    return template.format(a=a[0], b=b[0], **pronouns(a[1], 'a_'), **pronouns(b[1], 'b_'))


def main():
    rng, examples = random.Random(7), []
    for k in range(5):                                              # each thing five times, with different heroes
        for i, thing in enumerate(THINGS):
            hero = HEROES[(i * 5 + k * 3 + 1) % len(HEROES)]
            examples.append(example(rng, f'a {hero[0]} and {thing[0]}', thing_tale(rng, hero, thing)))
    for k in range(5):
        for i, template in enumerate(PAIRS):
            a, b = HEROES[(i * 3 + k * 7) % 16], HEROES[(i * 5 + k * 11 + 4) % 16]
            if a == b:
                b = HEROES[(i * 5 + k * 11 + 5) % 16]
            examples.append(example(rng, f'a {a[0]} and a {b[0]}', pair_tale(template, a, b)))
    examples += [example(rng, subject, tale) for subject, tale in THEMES]
    rng.shuffle(examples)
    for e in examples:
        print(json.dumps(e, ensure_ascii=False))


if __name__ == '__main__':
    main()
