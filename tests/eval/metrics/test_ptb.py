"""Tokens of captions, as the Java program (CoreNLP 3.4.1) gave them for these very lines."""

from __future__ import annotations

import pytest

from eval.metrics.captions import cider_per_image
from eval.metrics.ptb import tokenize_captions


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man's dog isn't here!", "a man 's dog is n't here"),
        ("It’s Bob’s, they’re off", "it 's bob 's they 're off"),
        ("I'd've gone; he'll stay", "i 'd 've gone he 'll stay"),
        ("five o'clock, y'all: rock 'n' roll in the '90s", "five o'clock y' all rock 'n' roll in the '90s"),
        ("a ma'am and O'Malley d'you", "a ma'am and o'malley d'you"),
        ("We cannot, gonna 'tis", "we can not gon na 't is"),
        ("the dogs' toys", "the dogs toys"),
        ("Mr. Smith of St. Louis, etc. at 9:30 a.m.", "mr. smith of st. louis etc. at 9:30 a.m."),
        ("the U.S. and the U.S.", "the u.s. and the u.s."),
        ("No. 5, no. of Mass. and mass.", "no. 5 no of mass. and mass"),
        ("Jan. sat. at word., x", "jan. sat at word. x"),
        ("a black-and-white t-shirt - mid-air--now", "a black-and-white t-shirt mid-air now"),
        ("3,000 of 5.5 in 1/2 a.b 1a.b", "3,000 of 5.5 in 1/2 a.b 1a b"),
        ("$5, €5 and £3 are 50%", "$ 5 $ 5 and # 3 are 50 %"),
        ("R&B r&b AT&T A+B", "r&b r & b at&t a+b"),
        ("#1 #tag @you a_b a__b", "# 1 #tag @you a_b a __ b"),
        ("www.foo.com, http://a.b/c. a@b.com x.jpg.", "www.foo.com http://a.b/c a@b.com x.jpg"),
        ("(a) [b] {c} <d> e<f", "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb- <d> e < f"),
        (":) ;-) <3", ":-rrb- ;--rrb- < 3"),
        ('"a" `b\' “c” … .. . . .', "a b c"),
        ("what?! no!! yes?", "what ?! no !! yes"),
        ("café 5° ½ x² 😀 a😀b", "café 5 ° 1/2 x ² a b"),
        ("5'10\" 8x10\" 1960's", "5 10 8x10 1960 's"),
        ("12/25/2010 555-1234 -5 +5 :30", "12/25/2010 555-1234 -5 +5 :30"),
        ("and/or w/ a/b/c/d", "and/or w / a/b/c / d"),
        ("----- --- -", "-----"),
        ("C++ and c# or F#", "c++ and c# or f#"),
        ("'twas so, 'tis", "'t was so 't is"),
        ("a\u2013b &mdash; c", "a b c"),
        ("R&amp;B &lt;a&gt; &quot;b&quot; &#39; &nbsp; c", "r&b < a > b &#39; c"),
        ("J's, A's 2's", "j 's a 's 2 's"),
        ("isn`t ma`am", "is n`t ma`am"),
        ("d' or l' ol' somethin' Dunkin' x", "d' or l' ol' somethin' dunkin' x"),
        ("N'Sync R'lyeh", "n'sync r'lyeh"),
        ("cont'd. s'mores ev'ry nat'l", "cont'd. s'mores ev'ry nat'l"),
        ("www.a.bc/x www.a.b.cde it.com it.com/ab. x.yz", "www.a.bc / x www.a.b.cde it.com it.com/ab x.yz"),
        ("12/25/10 1/2-90's", "12/25/10 1/2-90 's"),
        ("\u207a² x\u2082 5¹", "\u207a² x \u2082 5 ¹"),
        ("11/12 of 3/4\u2044", "11/12 of 3/4 \u2044"),
        ("pro- or anti-, S&P-500 C.D.s", "pro- or anti- s&p-500 c.d.s"),
        ("Cap'n c'est", "cap'n c'est"),
        ("c. d", "c. d"),
        ("Sr. Jr. Bldg.x y", "sr. jr. bldg. x y"),
        ("Canada-U.S. U.S.-U.K x", "canada-u.s. u.s.-u.k x"),
        ("in '90 x", "in '90 x"),
        ("5.x! 2.jpg 3.pdfs", "5.x 2.jpg 3 pdfs"),
        ("word.; x", "word. x"),
        ("<<a>> > b", "<< a >> > b"),
        ("^_^ (^_^) (-_-)", "^_^ -lrb-^_^-rrb- -lrb--_--rrb-"),
        ("ok .... b . . . c", "ok b c"),
        ("p.m.-ish., e.g.-b b-U.S.", "p.m.-ish. e.g.-b b-u.s."),
        ("F-16., x-y.; a-1.5", "f-16. x-y. a-1 .5"),
        ("x_y-z., A&P., B&W", "x_y-z. a&p. b&w"),
        ("'do 'a 's", "do a 's"),
        ("’man d’you ‘tis’", "'m an d’you tis"),
        ("n’t don’t.", "n't do n't"),
        ("*a* **b** \\* =d", "* a * ** b ** \\* =d"),
        ("a@b.c,d <e@f.g> mailto:x@y.z", "a@b.c,d <e@f.g> mailto:x@y.z"),
        ("a.m. The c. The c. Two", "a.m. the c the c. two"),
        ("no. 5 fig. a ca.5", "no. 5 fig a ca. 5"),
        ("$5 US$6 us$7 #8", "$ 5 us$ 6 us $ 7 # 8"),
        ("ftp://a.b/c, https://d.e-", "ftp / / a.b / c https://d.e"),
        ("“‘’”  `` ''", "``` '''"),
        ("État naïve Äñ \ufb01", "état naïve äñ \ufb01"),
        ("@@a ##b ~c %d", "@@ a ## b ~ c % d"),
        ("5-a,b-c 1.5-a 1,5a", "5-a b-c 1.5-a 1,5 a"),
        ("é \xad co\xadop", "é coop"),
        ("a &amp; b", "a & b"),
        ("a&b.com x%y.org, z", "a&b.com x%y.org z"),
        ("ab.cd., x", "ab.cd. x"),
        ("...5 .....6 ......7", "5 6 .7"),
        ("", ""),
    ],
)
def test_tokens_of_java(text: str, tokens: str) -> None:
    assert tokenize_captions([text, "next"]) == [tokens.split(), ["next"]]


def test_fractions_and_telephone_numbers_keep_their_blanks() -> None:
    assert tokenize_captions(["1 1/2 of 555 555 1234"]) == [["1\xa01/2", "of", "555\xa0555\xa01234"]]


@pytest.mark.parametrize(
    ("text", "tokens"), [("see etc.", "see etc."), ("they don't", "they do n't"), ("his dog's", "his dog 's")]
)
def test_the_end_of_the_last_caption(text: str, tokens: str) -> None:
    assert tokenize_captions([text]) == [tokens.split()]


def test_a_final_letter_depends_on_the_next_caption() -> None:
    lines = ["plan b.", "A dog", "plan b.", "Two dogs", "plan b."]
    assert [tokens[-1] for tokens in tokenize_captions(lines)] == ["b", "dog", "b.", "dogs", "b."]


def test_line_ends_inside_a_caption_are_blanks() -> None:
    assert tokenize_captions(["a\nb\r\nc\u2028d", "e"]) == [["a", "b", "c", "d"], ["e"]]


def test_a_fraction_is_two_words_for_cider() -> None:
    references = {1: ["1 1/2 miles"], 2: ["x y z"]}
    assert (
        cider_per_image({1: "1/2 miles", 2: "x"}, references)[1] > cider_per_image({1: "miles", 2: "x"}, references)[1]
    )


def test_cider_reads_captions_in_the_order_of_the_references() -> None:
    references = {1: ["plan b."], 2: ["A dog runs"], 3: ["x y z"]}
    candidates = {3: "x y z", 2: "A dog runs", 1: "plan b."}
    assert cider_per_image(candidates, references)[1] == pytest.approx(5)  # two words: no trigrams, no 4-grams
