"""What TinyWorld knows: its domains, their sentences and words. The notation is explained in `templates`.

In every list the words of the domain's first topic stand in front and those of its second topic at the end.
"""

from cratelab.corpora.tinyworld.templates import Domain

GIRLS = "Anna Clara Ella Grace Ida June Lily Maya Nora Rosa Sara Vera"
BOYS = "Ben Carl David Emil Felix Hugo Ivan Jack Leo Max Oscar Tom"
NUMBERS = "two three four five six seven eight nine ten eleven twelve thirteen"  # no "one dollars"
YEARS = "1912 1924 1931 1947 1958 1963 1976 1989"

# Every document starts with a title. Domains share its form, and some words with two meanings: until the opening
# begins, the domain may be unknown.
TITLE = """
3 <begin> notes on the {0} /title .
2 <begin> the {0} /title .
1 <begin> more about the {0} /title .
"""

STORIES = Domain(
    topics=("forest", "town"),
    lists={
        "girl": GIRLS,
        "boy": BOYS,
        "secret": "amber cedar copper ivory jasmine lotus maple onyx pearl velvet walnut willow",
        "place": "forest bank spring cave hill mill bridge inn tower harbour",
        "animal": "fox owl wolf deer hare cat goose donkey horse dog",
        "thing": "branch bark feather stone match key coin lamp letter",
        "trait": "wild quiet brave gentle clever polite rich proud",
        "feeling": "calm tired glad sad afraid angry",
        "moved": "crept climbed ran walked rode marched",
        "took": "found hid lost kept carried sold",
        "sky": "moon wind rain snow sun",
        "hour": "dawn dusk noon night",
        "said": "whispered said cried answered",
    },
    title=TITLE.format("$place"),
    opening="""
2 once /time there was /verb a $trait girl named $girl=hero /subject . her friend /subject was /verb $boy=friend \
/complement . their secret word /subject was /verb $secret=secret /complement .
1 long ago /time a girl named $girl=hero /subject lived /verb near the $place /place with a boy named $boy=friend \
/complement . their secret word /subject was /verb $secret=secret /complement .
""",
    body="""
3 @hero /subject $moved /verb to the $place /place .
2 @hero /subject $moved /verb past the $trait $animal /object at $hour /time .
3 @hero /subject $took /verb the $thing /object near the $place /place .
2 @hero and @friend /subject $took /verb the $thing and the $thing /object at $hour /time .
3 @friend /subject $moved /verb to the $place /place at $hour /time .
2 @friend /subject was /verb $feeling and $feeling /complement .
3 the $animal and the $animal /subject $moved /verb to the $place /place .
2 the $trait $animal /subject slept /verb near the $place /place .
2 the $sky /subject came /verb over the $place /place at $hour /time .
3 " the $trait $animal /subject $took /verb the $thing /object at $hour /time , " $said /verb @hero /speaker .
2 " where is /verb the $thing /subject ? " asked /verb @friend /speaker . " it /subject is /verb near the $place \
/place , " $said /verb @hero /speaker .
2 some day /time the $animal ( a $trait beast ) /subject came /verb to @hero /object .
1 then /time they /subject chose /verb a new secret word /object : $secret=secret /complement .
""",
    closing="""
2 at last /time @hero /subject said /verb the secret word /object : @secret /complement . the end . <end>
1 in the end /time @friend /subject asked /verb for the secret word /object , and @hero /subject said /verb @secret \
/object . <end>
""",
)

DIALOGUE = Domain(
    topics=("sport", "home"),
    lists={
        "girl": GIRLS,
        "boy": BOYS,
        "number": NUMBERS,
        "pastime": "match bat court ball goal song dinner spring garden party",
        "opinion": "fast fair tense loud good sweet warm lovely",
        "liked": "watched missed remembered liked planned enjoyed",
        "weekday": "Monday Tuesday Wednesday Thursday Friday",
        "mood": "laughed waited nodded smiled",
        "said": "cried said answered whispered",
    },
    title=TITLE.format("$pastime"),
    opening="""
2 $girl=caller /subject called /verb $boy=friend /object on $weekday /time . they /subject meet /verb in room \
$number=room /place .
1 $girl=caller and $boy=friend /subject talked /verb about the $pastime /object . they /subject meet /verb in room \
$number=room /place .
""",
    body="""
3 " i /subject $liked /verb the $opinion $pastime /object on $weekday /time , " $said /verb @caller /speaker .
3 " the $pastime and the $pastime /subject were /verb $opinion /complement , " $said /verb @friend /speaker .
2 " how was /verb the $pastime /subject ? " asked /verb @friend /speaker . " it /subject was /verb $opinion \
/complement , " $said /verb @caller /speaker .
2 " do /verb you /subject like /verb the $pastime /object ? " asked /verb @caller /speaker . " yes , it /subject is \
/verb $opinion /complement , " $said /verb @friend /speaker .
1 " do /verb you /subject like /verb the $pastime /object ? " asked /verb @caller /speaker . " no , i /subject \
$liked /verb the $pastime /object on $weekday /time , " $said /verb @friend /speaker .
3 @friend /subject $mood /verb for $number minutes near the $pastime /place .
3 @caller /subject $mood /verb on $weekday /time because the $pastime /subject was /verb $opinion /complement .
1 " look /verb at the bat#animal /object . it /subject can fly /verb , " $said /verb @caller /speaker .
1 " look /verb at the bat#sport /object . it /subject broke /verb , " $said /verb @caller /speaker .
1 " look /verb at the bark#tree /object . it /subject is /verb old /complement , " $said /verb @friend /speaker .
1 " listen /verb to the bark#dog /object . the dog /subject is /verb loud /complement , " $said /verb @friend /speaker .
1 " i /subject went /verb to the bank#river /place . i /subject caught /verb a fish /object , " $said /verb @friend \
/speaker .
1 " i /subject went /verb to the bank#finance /place . i /subject got /verb a loan /object , " $said /verb @friend \
/speaker .
1 then /time the room /subject became /verb room $number=room /complement .
""",
    closing="""
2 finally /time @caller /subject said /verb : " i /subject see /verb you /object in room @room /place . " <end>
1 before they /subject left /verb , @friend /subject asked /verb for the room /object . it /subject was /verb room \
@room /complement . <end>
""",
)

COUNT_WORDS = f"zero one {NUMBERS} fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()


def _counting() -> str:
    """Sequences whose step shows only after two terms, sums, differences, and little problems, a line each."""
    lines = []
    for first in range(21):
        for step in (1, 2, 3, 5, -1, -2):
            for length in (4, 6, 8):
                terms = [first + step * i for i in range(length)]
                if all(0 <= term <= 20 for term in terms):
                    start, *rest = (COUNT_WORDS[term] for term in terms)
                    lines.append(f"1 count /verb : {start} " + " ".join(f", {term} /result" for term in rest) + " .")
    for a in range(2, 11):
        for b in range(1, 11):
            x, y, total = COUNT_WORDS[a], COUNT_WORDS[b], COUNT_WORDS[a + b]
            lines.append(f"1 {x} and {y} /subject make /verb {total} /result .")
            lines.append(f"1 {total} less {y} /subject leaves /verb {x} /result .")
            lines.append(
                f"1 $girl=person /subject has /verb {x} $item=item /object and gets /verb {y} more /object . now /time "
                f"she /subject has /verb {total} /result @item /object ."
            )
    return "\n".join(lines)


COUNTING = Domain(
    topics=("fruit", "household"),
    lists={
        "girl": GIRLS,
        "number": NUMBERS,
        "item": "apples pears plums beans spoons cups coins beads",
    },
    title=TITLE.format("$item"),
    opening="""
2 let /verb us /subject count /verb the $item /object . the lucky number /subject is /verb $number=lucky /complement .
1 $girl /subject likes /verb to count the $item /object . the lucky number /subject is /verb $number=lucky \
/complement .
""",
    body=_counting(),
    closing="""
2 so the lucky number /subject was /verb @lucky /complement . <end>
1 remember /verb the lucky number /object : it /subject is /verb @lucky /complement . <end>
""",
)

BIOLOGY = Domain(
    topics=("animals", "molecules"),
    lists={
        "strain": "alpha beta gamma delta epsilon zeta theta kappa lambda sigma tau omega",
        "author": "Chen Diaz Khan Mori Okafor Patel Rossi Silva",
        "number": NUMBERS,
        "year": YEARS,
        "specimen": "bat seal crane mouse bug shell plant root virus bond cell",
        "medium": "sea lake soil leaf tissue blood",
        "substance": "salt iron fat sugar protein enzyme",
        "uses": "needs loses stores absorbs binds",
        "observed": "observed counted followed measured stained",
        "manner": "quickly slowly poorly rapidly weakly",
    },
    title=TITLE.format("$specimen"),
    opening="""
2 we /subject studied /verb strain $strain=strain of the $specimen /object . the dose /subject was /verb $number=dose \
units /complement .
1 this paper /subject describes /verb strain $strain=strain from the $medium /object . the dose /subject was /verb \
$number=dose units /complement .
""",
    body="""
4 the $specimen /subject $uses /verb $substance and $substance /object from the $medium /place .
3 the $specimen /subject was found /verb in the $medium /place ( $number samples ) .
2 the $specimen /subject was found /verb near the $specimen and the $specimen /place .
3 we /subject $observed /verb the $specimen in the $medium /object [ $author , $year ] .
2 in the trial /time the $specimen /subject grew /verb $manner /complement ( $number days ) .
2 $author /subject showed /verb that the $specimen /subject $uses /verb $substance /object [ $author , $year ] .
2 strain @strain /subject grew /verb $manner /complement in the $medium with $substance /place .
1 later /time the dose /subject became /verb $number=dose units /complement .
""",
    closing="""
2 to conclude , strain @strain /subject needs /verb the dose of @dose units /object . <end>
1 our results /subject show /verb that @dose units /subject suit /verb strain @strain /object . <end>
""",
)

LAW = Domain(
    topics=("crime", "contract"),
    lists={
        "plaintiff": "Adams Baker Cole Dunn Ellis Frost Gray Holt",
        "defendant": "Irving Kent Lowe Marsh Nash Owens Page Reed",
        "number": NUMBERS,
        "year": YEARS,
        "issue": "court trial cell jury witness lease deed contract seal party",
        "legal": "guilty false violent valid void written",
        "heard": "heard examined described accepted delivered signed",
    },
    title=TITLE.format("$issue"),
    opening="""
2 in the case of $plaintiff=plaintiff v . $defendant=defendant /title , the claim /subject is /verb for $number=claim \
pounds /complement .
1 $plaintiff=plaintiff /subject sues /verb $defendant=defendant /object over the $issue /complement . the claim \
/subject is /verb for $number=claim pounds /complement .
""",
    body="""
3 the judge /subject $heard /verb the $issue /object .
3 the judge /subject $heard /verb the $legal $issue of the $issue /object [ see section $number ] .
2 the judge /subject found /verb the $issue /object $legal /complement [ $plaintiff v . $defendant , $year ] .
3 the $issue and the $issue /subject were /verb $legal /complement under section $number /place .
2 the $issue /subject was /verb $legal /complement [ $plaintiff v . $defendant , $year ] .
2 @plaintiff /subject stated /verb that the $issue /subject was /verb $legal and $legal /complement .
2 @defendant /subject denied /verb the $legal $issue /object ( see section $number ) .
2 counsel for @defendant /speaker said /verb : " the $issue /subject is /verb $legal /complement . "
1 later /time the claim /subject became /verb $number=claim pounds /complement .
""",
    closing="""
2 it /subject is ordered /verb that @defendant /subject pay /verb @plaintiff /object @claim pounds /complement . <end>
1 for these reasons @plaintiff /subject wins /verb @claim pounds /object from @defendant /complement . <end>
""",
)

MARKETS = Domain(
    topics=("shares", "industry"),
    lists={
        "company": "Acme Borex Corvo Delmar Fintra Globex Halcor Lumo Norvik Orbis Quanta Zentar",
        "boy": BOYS,
        "number": NUMBERS,
        "asset": "bond bank share fund index steel oil crane plant",
        "rose": "rose jumped slipped fell",
        "tone": "risky strong cheap weak slow heavy",
        "people": "traders investors lenders makers builders farmers",
        "weekday": "Monday Tuesday Wednesday Thursday Friday",
        "traded": "bought sold financed shipped built",
    },
    title=TITLE.format("$asset"),
    opening="""
2 shares of $company=company /subject opened /verb at $number=price dollars /complement . the chairman /subject is \
/verb $boy=chairman /complement .
1 $company=company /subject is /verb led by $boy=chairman /complement . its shares /subject opened /verb at \
$number=price dollars /complement .
""",
    body="""
4 the $asset and the $asset /subject $rose /verb by $number percent /complement .
3 @company /subject $traded /verb the $tone $asset /object on $weekday /time .
3 $people and $people /subject said /verb that the $asset /subject looked /verb $tone /complement .
2 $people /subject $traded /verb the $asset /object for $number dollars /complement .
2 the $asset ( up $number percent ) /subject looked /verb $tone /complement .
2 @chairman /speaker said /verb : " the $asset /subject is /verb $tone /complement . "
1 @company /subject now /time trades /verb at $number=price dollars /complement .
""",
    closing="""
2 at the close /time @company /subject stood /verb at @price dollars /complement . <end>
1 in short , @chairman /subject said /verb that @company /subject is /verb worth @price dollars /complement . <end>
""",
)

CODE = Domain(
    topics=("files", "network"),
    lists={
        "variable": "width height size total limit score rate speed",
        "digit": "0 1 2 3 4 5 6 7 8 9",
        "part": "file root shell branch bug key match mouse virus server",
        "action": "open merge fix check load parse send block",
        "state": "empty ready slow broken",
    },
    title=TITLE.format("$part"),
    opening=r"""
2 def main /subject ( ) : \n $variable=variable /subject = /verb $digit=value /object \n
1 # $action /verb the $part /object \n $variable=variable /subject = /verb $digit=value /object \n
""",
    body=r"""
3 $action /verb ( $part , $part /object ) \n
2 if $part=flag /subject : \n $action /verb ( @flag /object ) \n
2 for $part=each /subject in range ( $digit ) : \n $action /verb ( @each /object ) \n
2 print /verb ( @variable /object ) # @value /result \n
2 @variable /subject = /verb $digit=value /object \n
2 # $action /verb the $state $part /object \n
1 # the $part /subject is /verb $state /complement \n
""",
    closing=r"""
2 return /verb @variable /object # @value /result \n <end>
1 assert @variable /subject == /verb @value /object \n <end>
""",
)

DOMAINS = {
    "stories": STORIES,
    "dialogue": DIALOGUE,
    "counting": COUNTING,
    "biology": BIOLOGY,
    "law": LAW,
    "markets": MARKETS,
    "code": CODE,
}

# The sense of a word with several meanings follows from the domain, except where a sentence names it (bat#animal).
SENSES = {
    "bank": {"stories": "river", "markets": "finance"},
    "bark": {"stories": "tree"},
    "bat": {"dialogue": "sport", "biology": "animal"},
    "bond": {"biology": "chemistry", "markets": "finance"},
    "branch": {"stories": "tree", "code": "version"},
    "bug": {"biology": "insect", "code": "defect"},
    "cell": {"biology": "organism", "law": "prison"},
    "court": {"dialogue": "tennis", "law": "judges"},
    "crane": {"biology": "bird", "markets": "machine"},
    "key": {"stories": "lock", "code": "entry"},
    "match": {"stories": "fire", "dialogue": "game", "code": "pattern"},
    "mouse": {"biology": "animal", "code": "device"},
    "party": {"dialogue": "feast", "law": "litigant"},
    "plant": {"biology": "organism", "markets": "factory"},
    "root": {"biology": "organ", "code": "folder"},
    "seal": {"biology": "animal", "law": "stamp"},
    "shell": {"biology": "animal", "code": "program"},
    "spring": {"stories": "water", "dialogue": "season"},
    "trial": {"biology": "experiment", "law": "hearing"},
    "virus": {"biology": "disease", "code": "program"},
}

# The class of every word. A list's words have the class of the list, which `$list` stands for.
CLASSES = {
    "noun": "$secret $place $animal $thing $sky $hour $pastime $item $strain $specimen $medium $substance "
    "$issue $asset $people $variable $part shares room girl boy friend beast strain word end day fish "
    "loan minutes number dose units paper results samples days claim case pounds section counsel "
    "reasons judge dollars percent chairman close notes",
    "name": "$girl $boy $author $plaintiff $defendant $company $weekday main",
    "number": "$number $year $digit zero one fourteen fifteen sixteen seventeen eighteen nineteen twenty",
    "verb": "$moved $took $said $liked $mood $uses $observed $heard $rose $traded $action was is named lived "
    "asked came chose were slept called meet talked do like look can fly broke listen went caught got "
    "became see left let count likes make leaves has gets remember studied describes conclude found "
    "grew showed needs show suit sues stated denied pay wins ordered opened led looked trades stood",
    "adjective": "$trait $feeling $opinion $legal $tone $state secret new lucky old worth",
    "adverb": "$manner once long ago then finally now later so up more short last",
    "pronoun": "i you it they she us we her their its our these this that there where how",
    "determiner": "the a some",
    "preposition": "on about near with to at over in for before of from by under past v less",
    "conjunction": "and because",
    "interjection": "yes no",
    "keyword": "def if range print return assert",
    "punctuation": '. , : ? " ( ) [ ] # = == \\n',
    "boundary": "<begin> <end>",
}
