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
        ("", ""),
    ],
)
def test_tokens_of_java(text: str, tokens: str) -> None:
    assert tokenize_captions([text, "next"]) == [tokens.split(), ["next"]]


def test_fractions_and_telephone_numbers_keep_their_blanks() -> None:
    assert tokenize_captions(["1 1/2 of 555 555 1234"]) == [["1\xa01/2", "of", "555\xa0555\xa01234"]]


def test_a_final_letter_depends_on_the_next_caption() -> None:
    lines = ["plan b.", "A dog", "plan b.", "Two dogs", "plan b."]
    assert [tokens[-1] for tokens in tokenize_captions(lines)] == ["b", "dog", "b.", "dogs", "b."]


def test_line_ends_inside_a_caption_are_blanks() -> None:
    assert tokenize_captions(["a\nb\r\nc\u2028d", "e"]) == [["a", "b", "c", "d"], ["e"]]


def test_cider_reads_captions_in_the_order_of_the_references() -> None:
    references = {1: ["plan b."], 2: ["A dog runs"], 3: ["x y z"]}
    candidates = {3: "x y z", 2: "A dog runs", 1: "plan b."}
    assert cider_per_image(candidates, references)[1] == pytest.approx(5)  # two words: no trigrams, no 4-grams
