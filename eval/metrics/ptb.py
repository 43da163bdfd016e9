"""The tokens of Stanford's PTBTokenizer (CoreNLP 3.4.1, options -preserveLines -lowerCase), without Java.

The official caption scores (https://github.com/salaniz/pycocoevalcap) cut captions with it, all captions of a file in
one go, and drop some punctuation. Reproduced is its behaviour, as seen by comparing with the Java program: of all rules
that fit at a place that one wins which reads furthest, counting what it wants to see behind the token; among equals the
first. Rules look beyond the end of a line: "plan b." ends in "b" if the next caption begins with "A ", else in "b.".

Not reproduced: letters of scripts other than Latin, Greek and Cyrillic where Java 17 and Python know different ones.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_DROPPED = frozenset({"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"})
"""Brackets stay: the official list has them as -LRB-, but tokens are in lower case."""
_OTHER_LINE_ENDS = re.compile(r"\r\n?|[\n\x0b\x0c\x85\u2028\u2029]")
"""White space here; the official script would take what follows for the next caption."""

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_MONEY = {"¢": "cents", "£": "#", "€": "$", "\x80": "$", "₠": "$", "¤": "$"}
_FRACTIONS = {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_QUOTES = {
    "&apos;": "'",
    "&quot;": '"',
    **dict.fromkeys("\x91‘‛‹", "`"),
    **dict.fromkeys("\x92’›", "'"),
    **dict.fromkeys("\x93“«", "``"),
    **dict.fromkeys("\x94”»", "''"),
}

_GAP = r"[ \t\xa0\u2000-\u200a\u3000\n]"
_LETTER = (
    r"(?:(?![\xb2\xb3\xb9\xbc-\xbe\u2070\u2074-\u2079\u2080-\u2089\u2150-\u2182\u2185-\u218b\u2460-\u249b\u24ea-\u24ff"
    r"\u2776-\u2793\u3007\u3021-\u3029\U00010000-\U0010ffff])[^\W\d_])"
)
_LETTER_OR_MARK = (
    rf"(?:{_LETTER}|[\xad\u0300-\u036f\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02ff\u0375\u0384\u0385\u03f6\u0483-\u0487]"
    r"|&[aeiouAEIOU](?:acute|grave|uml);)"
)
_SIGN = rf"(?:{_LETTER}|\d)"
_SIGN_OR_MARK = rf"(?:{_LETTER_OR_MARK}|\d)"
_APOSTROPHE = r"(?:['\x92\u2019]|&apos;)"
_ANY_APOSTROPHE = r"(?:['\x92\u2019`\x91\u2018\u201b]|&apos;)"
_NUMBER = r"(?:\d+(?:[.:,\xad\u066b\u066c]\d+)*|(?:[.:,\xad\u066b\u066c]\d+)+)"
_CLITIC = rf"{_APOSTROPHE}(?:[msdMSD]|(?i:re|ve|ll))"
_WORD = rf"{_LETTER_OR_MARK}{_SIGN_OR_MARK}*(?:[.!?]{_LETTER_OR_MARK}{_SIGN_OR_MARK}*)*"
_HYPHEN = r"[-_\u058a\u2010\u2011]"
_TAG = (
    r"<(?:[!?][A-Za-z\-][^>\n]*|/[A-Za-z][A-Za-z0-9_:.\-]*|[A-Za-z][A-Za-z0-9_:.\-]*(?: +[A-Za-z][A-Za-z0-9_:.\-]*"
    r"(?: *= *(?:'[^'\n]*'|\"[^\"\n]*\"))?)* */?) *>"
)
_PLAIN = r"A-Za-z0-9"
_INSIDE_SENTENCE = r"[,;:\u3001]"

_MONTHS = "Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec"
_DAYS = "Mon|Tues?|Wed|Thu|Thurs|Fri"
_STATES = (
    "(?i:Ala|Ariz|Calif|Colo|Conn|Ct|Dak|Fla|Ga|Ind|Kans?|Ky|Md|Mich|Minn|Mo|Mont|Neb|Nev|Okla|Penn|Tenn|Va|Vt|Wisc?"
    "|Wyo)|A(?i:z|rk)|D(?i:el)|I(?i:ll)|L(?i:a)|M(?i:ass|iss)|O(?i:re)|P(?i:a)|T(?i:ex)|W(?i:ash)"
)
"""Those that are words as well need a capital."""
_FIRMS = "Inc|Cos?|Corp|Pp?t[ye]s?|Ltd|Plc|Rt|Bancorp|Bhd|Assn|Univ|Intl|Sys"
_BEFORE_SMALL = (
    f"(?i:{_MONTHS}|{_DAYS}|{_FIRMS}|tel|est|ext|sq|Jr|Sr|Bros|(?:Ed|Ph)\\.D|Esq|etc|al|seq|Bldg|Blvd|Rd)|{_STATES}"
)
_TITLES = (
    "Mr|Mrs|Ms|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj|Sgt|Cpl|Pvt|Capt|Ste?|Ave|Pres|Lieut"
    "|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Mt|Ft|Adj|Adv|Asst|Assoc|Ens|Insp|Mlle|Mme|Msgr|Sfc"
)
_LONG_INITIALS = (
    r"(?:(?i:Canada|Sino|Korean|EU|Japan|non)-(?i:U\.S)|(?i:U\.S)\.-(?i:U\.S\.S\.R|U\.K)|[A-Za-z](?:\.[A-Za-z])+)"
)
_INITIALS = rf"(?:{_LONG_INITIALS}|[A-Za-z])"
_BEFORE_CAPITALS = rf"(?:(?i:{_TITLES}|vs|Alex|Wm|Jos|Cie|a\.k\.a|cf|TREAS|Ph|Invt|Elec|Natl|M[ft]g|Dept)|M(?i:iss))"
_BEFORE_NUMBERS = "(?i:ca|figs?|prop|nos?|art|bldg|pp|op)"
_SENTENCE_STARTS = (
    "A(?i:bout|ccording|dditionally|fter|n|s|t|)|B(?i:ut)|E(?i:arlier)|H(?i:ere|er|owever|e)|I[fFnNtT]|L(?i:ast)"
    r"|M(?i:any|ore|r\.|s\.)|N(?i:ow)|O(?i:nce|ne|ther|ur)|S(?i:he|ince|ome|o|uch)"
    f"|T(?i:hat|heir|hen|here|hese|hey|his|he)|W(?i:e|hen|hile|hat)|Y(?i:et|ou)|{_TAG}"
)
_WORDS_WITH_APOSTROPHE = (
    rf"{_APOSTROPHE}[nN]{_APOSTROPHE}?",
    rf"[lLdDjJ]{_APOSTROPHE}",
    rf"(?i:Dunkin|somethin|ol){_APOSTROPHE}",
    rf"{_APOSTROPHE}(?i:em|till?|cause|[2-9]0s)",
    rf"[A-HJ-XZn]{_ANY_APOSTROPHE}{_LETTER}{{2,}}",
    rf"{_LETTER}+[aeiouyAEIOUY]{_ANY_APOSTROPHE}[aeiouA-Z]{_LETTER}*",
    r"(?i:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)",
)
_THING = rf"(?:[dDoOlL]{_ANY_APOSTROPHE}{_SIGN})?{_SIGN}+(?:{_HYPHEN}(?:[dDoOlL]{_ANY_APOSTROPHE}{_SIGN})?{_SIGN}+)*"
_SITE = (
    r"(?:(?i:www)\.(?:[^ \t\n\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}"
    r"|(?:[^ \t\n\"`'<>|.!?(){},-_$]+\.)+(?i:com|net|org|edu))"
)
_QUOTES_IN_A_ROW = r"[`\u2018-\u201f\x82\x84\x91-\x94\u2039\u203a\xab\xbb]{1,2}|'|&apos;"
_SYMBOL = (
    r"[+%&~\^|\\\xa6-\xa9\xac\xae-\xb4\xb6-\xba\xd7\xf7\u0387\u2016\u2017\u2020-\u2023\u2030-\u2038\u203b"
    r"\u203e-\u2042\u2044\u207a-\u207e\u208a-\u208e\u2100-\u214f\u2190-\u2bff\u3012\u30fb\uff01-\uff0f"
    r"\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
)
_FILE_ENDINGS = (
    "bat|bmp|class|cgi|cpp|c|dll|docx?|exe|gif|gz|html?|h|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar|txt"
    "|wav|xml|x|zip"
)


def _whole(text: str) -> str:
    """Without soft hyphens."""
    return text.replace("\xad", "") or "-"


def _fixed_blanks(text: str) -> str:
    return text.replace(" ", "\xa0")


def _brackets(text: str) -> str:
    return text.replace("(", "-lrb-").replace(")", "-rrb-")


def _ampersands(text: str) -> str:
    return re.sub("&amp;", "&", text, flags=re.IGNORECASE)


def _straight(text: str) -> str:
    """Quotation marks of other kinds as the Penn Treebank writes them."""
    return re.sub("&apos;|&quot;|.", lambda found: _QUOTES.get(found[0], found[0]), text, flags=re.DOTALL)


def _opening_quotes(text: str) -> str:
    return _straight(text).replace("''", '"').replace("'", "`").replace('"', "``")


def _closing_quotes(text: str) -> str:
    return _straight(text).replace('"', "''")


@dataclass(frozen=True)
class _Rule:
    """A token (group 1) with what must stand behind it, and how many of its last signs are read again."""

    pattern: re.Pattern[str]
    say: Callable[[str], str]
    given_back: int


def _rule(token: str, behind: str = "", say: Callable[[str], str] = str, given_back: int = 0) -> _Rule:
    return _Rule(re.compile(f"({token})(?:{behind})"), say, given_back)


_RULES = (
    _rule(r"[cC](?:\+\+|#)|[fF]#"),
    _rule("(?i:cannot)", given_back=3),
    _rule("(?i:gonna|gotta|lemme|gimme|wanna)|'(?i:tis)", given_back=2),
    _rule("'(?i:twas)", given_back=3),
    _rule(_TAG, say=_fixed_blanks),
    _rule(r"&(?i:MD|mdash|ndash);|[\x96\x97\u2013-\u2015]", say=lambda _: "--"),
    _rule("&(?i:amp);", say=_ampersands),
    _rule(r"&(?i:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);"),
    _rule(_WORD, behind=_CLITIC, say=_whole),
    _rule(r"[A-Za-z\xad]*[A-MO-Za-mo-z]\xad*", behind=rf"[nN]{_ANY_APOSTROPHE}[tT]", say=_whole),
    _rule(_WORD, say=_whole),
    *map(_rule, _WORDS_WITH_APOSTROPHE),
    _rule(rf"[yY]{_APOSTROPHE}", behind=_LETTER),
    _rule(r"(?i:https?)://[^ \t\n\"<>|(){}]+[^ \t\n\"<>|.!?(){},-]"),
    _rule(_SITE),
    _rule(rf"{_SITE}/[^ \t\n\"<>|()]+[^ \t\n\"<>|.!?(){{}},-]"),
    _rule(
        r"(?:&lt;|<)?[a-zA-Z0-9][^ \t\n\"<>|(){}\xa0]*@(?:[^ \t\n\"<>|(){}.\xa0]+\.)*[^ \t\n\"<>|(){}.\xa0]+(?:&gt;|>)?"
    ),
    _rule(rf"@[a-zA-Z_][a-zA-Z_0-9]*|#{_LETTER_OR_MARK}+"),
    _rule(_CLITIC, behind="[^A-Za-z]", say=_closing_quotes),
    _rule(r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}"),
    _rule(rf"[-+]?{_NUMBER}", say=_whole),
    _rule(r"[\u207a\u207b\u208a\u208b]?(?:[\u2070\xb9\xb2\xb3\u2074-\u2079]+|[\u2080-\u2089]+)"),
    _rule(r"(?:\d{1,4}[- \xa0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}", say=_fixed_blanks),
    _rule(r"[\xbc-\xbe\u2153-\u215e]", say=lambda sign: _FRACTIONS.get(sign, sign)),
    _rule(r"-(?i:RRB|LRB|RCB|LCB|RSB|LSB)-|(?i:C\.D\.s|pro-|anti-|S(?:&|&amp;)P-500|S(?:&|&amp;)Ls)", say=_ampersands),
    _rule(rf"(?i:Cap{_APOSTROPHE}n|c{_APOSTROPHE}est)"),
    _rule(rf"[{_PLAIN}]+(?:-[A-Za-z]+){{0,2}}(?:\\?/[{_PLAIN}]+(?:-[A-Za-z]+){{0,2}}){{1,2}}"),
    _rule(r"[A-Z]*\$|#"),
    _rule(r"[\xa2-\xa5\x80\u20a0\u20ac\u060b\u0e3f\u20a4\uffe0\uffe1\uffe5\uffe6]", say=lambda s: _MONEY.get(s, s)),
    _rule(r"[A-Za-z]\.", behind=rf"{_GAP}+(?:{_SENTENCE_STARTS}){_GAP}", given_back=1),
    _rule(rf"{_BEFORE_NUMBERS}\.", behind=rf"{_GAP}?\d"),
    _rule(rf"(?:{_BEFORE_SMALL})\.", behind=r"[\s\S]{2}"),
    _rule(rf"(?:{_BEFORE_SMALL})\."),
    _rule(rf"(?:{_BEFORE_CAPITALS}|{_INITIALS})\."),
    _rule(_INITIALS, behind=_GAP),
    _rule(rf"{_APOSTROPHE}[0-9][0-9]", behind=_GAP),
    _rule(rf"{_SIGN_OR_MARK}+(?:[.]{_SIGN_OR_MARK}+)*\.(?i:{_FILE_ENDINGS})", behind=rf"(?:{_GAP}|[.?!,])"),
    _rule(rf"{_WORD}\.", behind=_INSIDE_SENTENCE, say=_whole),
    _rule(
        r"\([0-9]{2,3}\)[ \xa0]?[0-9]{3,4}[- \xa0]?[0-9]{3,5}"
        r"|(?:\+\+?)?(?:[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0][0-9]{3,4}[- \xa0]?[0-9]{3,5}"
        r"|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
        say=lambda text: _brackets(_fixed_blanks(text)),
    ),
    _rule("\"|&(?i:quot);|''", say=_closing_quotes),
    _rule("<|&(?i:lt);", say=lambda _: "<"),
    _rule(">|&(?i:gt);", say=lambda _: ">"),
    _rule(r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", behind=rf"[^{_PLAIN}]", say=_brackets),
    _rule(r"[\^x=~<>]\.\[\^x=~<>]|[-\^x=~<>']_[-\^x=~<>']", say=_brackets),
    _rule(r"\([-\^x=~<>'][_.]?[-\^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)", say=_brackets),
    _rule(r"[(){}\[\]]", say=lambda sign: _BRACKETS[sign]),
    _rule("-+", say=lambda text: "--" if len(text) in (3, 4) else text),
    _rule(r"\.{3,5}|\.[ \xa0](?:\.[ \xa0])+\.|\u2026", say=lambda _: "..."),
    _rule(r"@+|#+|_+|\*+|(?:\\\*){1,3}"),
    _rule(rf"{_INSIDE_SENTENCE}|[?!]+|[.\xa1\xbf\u037e\u0589\u061f\u06d4\u0700-\u0702\u07fa\u3002]|=|/"),
    _rule(
        rf"[{_PLAIN}][{_PLAIN}.,\xad]*(?:-(?:{_LONG_INITIALS}\.|[{_PLAIN}\xad]+))+\.",
        behind=_INSIDE_SENTENCE,
        say=_whole,
    ),
    _rule(rf"[{_PLAIN}][{_PLAIN}.,\xad]*(?:-(?:{_LONG_INITIALS}\.|[{_PLAIN}\xad]+))+", say=_whole),
    _rule(rf"{_THING}\.", behind=_INSIDE_SENTENCE),
    _rule(_THING),
    _rule(r"[A-Z]+(?:(?:[+&]|&(?i:amp);)[A-Z]+)+\.", behind=_INSIDE_SENTENCE, say=_ampersands),
    _rule(r"[A-Z]+(?:(?:[+&]|&(?i:amp);)[A-Z]+)+", say=_ampersands),
    _rule("'", behind=r"[A-Za-z][^ \t\xa0\u2000-\u200a\u3000\n]", say=_opening_quotes),
    _rule(_CLITIC, say=_closing_quotes),
    _rule(rf"[nN]{_ANY_APOSTROPHE}[tT]", say=_closing_quotes),
    _rule(_QUOTES_IN_A_ROW, say=_closing_quotes),
    _rule("<<|>>"),
    _rule("&(?i:nbsp);", say=lambda _: ""),
    _rule(_SYMBOL),
)
_EASY = re.compile(r"(?P<word>[A-Za-z]+)(?=[ \n]|[.,][ \n])|(?P<end>\n)|(?P<nothing>[ \t]+|,(?=[ \n])|\.(?=\n| [^.]))")
"""What most of a caption is made of: here no rule but the obvious one can fit."""
_ODD = re.compile(
    rf"(?i:cannot|gonna|gotta|lemme|gimme|wanna)|(?:{_BEFORE_SMALL}|{_BEFORE_CAPITALS}|{_BEFORE_NUMBERS}|[A-Za-z])"
)
"""... except in these, split or perhaps abbreviations."""


def tokenize_captions(texts: Sequence[str]) -> list[list[str]]:
    """The tokens of captions that stand in one file below one another: lower case, without the dropped punctuation."""
    joined = "\n".join(_OTHER_LINE_ENDS.sub(" ", text) for text in texts)
    lines: list[list[str]] = [[]]
    place = 0
    while place < len(joined):
        easy = _EASY.match(joined, place)
        if easy is None or (easy["word"] and _is_odd(easy["word"])):
            token, place = _next_token(joined, place)
        else:
            token, place = (easy["word"] or "").lower(), easy.end()
            if easy["end"]:
                lines.append([])
        if token and token not in _DROPPED:
            lines[-1].append(token)
    return lines


@functools.cache
def _is_odd(word: str) -> bool:
    return _ODD.fullmatch(word) is not None


def _next_token(text: str, place: int) -> tuple[str, int]:
    """The token at `place`, "" for a sign that is none, and where to read on."""
    best, winner = None, None
    for rule in _RULES:
        found = rule.pattern.match(text, place)
        if found and (best is None or found.end() > best.end()):
            best, winner = found, rule
    if best is None or winner is None:
        return "", place + 1
    end = best.end(1) - winner.given_back
    return winner.say(text[place:end]).lower(), end
