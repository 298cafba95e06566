"""Grammars for the tests here and on the real model: good ones, wrong ones with the blame, and those that kill.

The bombs are what llama.cpp was killed or stalled by: deep nesting (a crash of its recursive parser), written-out
repetitions (memory), bounds upside down (an endless loop), its search for left recursion (time, or the stack), and
places that double with every bracket of a text (time and memory, once it runs).
"""

from __future__ import annotations

FINE = {
    "literal": 'root ::= "a"',
    "empty": "root ::= ",
    "alternatives over lines": 'root ::= "a" |\n  "b" |\r\n "c"\n\n',
    "comments": '# first\nroot ::= "a" # then\n# last',
    "newlines in groups": 'root ::= (\n "a"\n | b\n)\nb ::= [\\n\\t\\r\\\\\\"\\[\\]\\-]',
    "escapes": 'root ::= "\\x41\\u00e9\\U0001F600\\"" [\\x00-\\x1F]'.replace("\\x00", "\\x01"),
    "classes": "root ::= [a-z] [^a-z] [a-] [-a] [é-ü] .",
    "quantifiers": 'root ::= "a"* "b"+ "c"? "d"{2} "e"{1,} "f"{0,3} ("g" | "h"){ 2 , 3 }',
    "tokens": "root ::= <[5]> !<[7]>* <[123456789]>",
    "forward reference": 'root ::= later\nlater ::= "a"',
    "right recursion": 'root ::= "a" root | ""',
    "arithmetic": 'root ::= expr\nexpr ::= term ([-+*/] term)*\nterm ::= [0-9]+ | "(" expr ")"',
    "json": (
        "root ::= value\n"
        'value ::= "{" (pair ("," pair)*)? "}" | "[" (value ("," value)*)? "]" | string | [0-9]+ | "null"\n'
        'pair ::= string ":" value\nstring ::= "\\"" [^"\\\\]* "\\""'
    ),
    "statements": (
        "root ::= statement*\n"
        'statement ::= name "=" expr ";" | "if(" expr "){" statement* "}" ("else{" statement* "}")?\n'
        'name ::= [a-z] [a-z0-9]*\nexpr ::= sum\nsum ::= term (("+" | "-") term)*\n'
        'term ::= name | [0-9]+ | "-" term | "(" expr ")"'
    ),
    "list": 'root ::= item+\nitem ::= "- " [^\\r\\n]+ "\\n"',
    "optional properties": (
        'root ::= "{" ("a:" v)? ("b:" v)? ("c:" v)? "}"\nv ::= [0-9]+ | root | "[" (v ("," v)*)? "]"'
    ),
    "deep": "root ::= " + "(" * 32 + '"a"' + ")" * 32,
    "most repetitions": "root ::= [a-z]{0,1999}",
    "many rules": "\n".join(["root ::= r0", *(f'r{i} ::= "a" r{i + 1}' for i in range(500)), 'r500 ::= "b"']),
}

WRONG: dict[str, tuple[str, str, int, int]] = {
    "no root": ('a ::= "a"', "no_root", 0, 0),
    "nothing": ("", "no_root", 0, 0),
    "a line too many": ('root ::= "a"\n  b\n', "syntax", 2, 4),
    "undefined rule": ('root ::= "a" |\n  bad "b"', "undefined_rule", 2, 3),
    "undefined in a group": ('root ::= ("a" | (bad)?)', "undefined_rule", 1, 18),
    "defined twice": ('root ::= "a"\nroot ::= "b"', "duplicate_rule", 2, 1),
    "no definition": ("root", "syntax", 1, 5),
    "underscore": ("root ::= a_b", "syntax", 1, 11),
    "open literal": ('root ::= "a', "syntax", 1, 12),
    "open class": ("root ::= [a", "syntax", 1, 12),
    "open group": ('root ::= ("a"', "syntax", 1, 14),
    "stray bracket": ('root ::= "a")', "syntax", 1, 13),
    "empty class": ("root ::= []", "syntax", 1, 10),
    "backward range": ("root ::= [z-a]", "syntax", 1, 10),
    "unknown escape": ('root ::= "\\q"', "syntax", 1, 11),
    "short escape": ('root ::= "\\x4"', "syntax", 1, 11),
    "beyond Unicode": ('root ::= "\\U00110000"', "syntax", 1, 11),
    "surrogate": ('root ::= "\\uD800"', "syntax", 1, 11),
    "lone surrogate": ('root ::= "\ud800"', "syntax", 1, 11),
    "NUL": ('root ::= "a\0b"', "syntax", 1, 12),
    "nothing to repeat": ("root ::= *", "syntax", 1, 10),
    "nothing to repeat in a group": ('root ::= (+ "a")', "syntax", 1, 11),
    "an empty literal repeated": ('root ::= ""*', "syntax", 1, 12),
    "open braces": ('root ::= "a"{2', "syntax", 1, 15),
    "no count": ('root ::= "a"{,2}', "syntax", 1, 14),
    "zero times": ('root ::= "a"{0}', "repetition", 1, 13),
    "bad token": ("root ::= <[abc]>", "syntax", 1, 10),
    "open token": ("root ::= <think", "syntax", 1, 10),
    "negated nothing": ('root ::= !"a"', "syntax", 1, 11),
    "a group of 1,000 rules repeated": ('root ::= ("a"{0,999} "b"){2,3}', "repetition", 1, 26),
    "never ends": ('root ::= "a" root', "never_ends", 1, 1),
    "never ends together": ('root ::= a | b\na ::= "x" b\nb ::= "y" a', "never_ends", 1, 1),
    "left recursion": ('root ::= root "a" | "b"', "left_recursion", 1, 1),
    "itself alone": ('root ::= root | "b"', "left_recursion", 1, 1),
    "indirect left recursion": ('root ::= a\na ::= b "x" | "y"\nb ::= c\nc ::= a', "left_recursion", 2, 1),
    "left recursion behind an empty rule": ('root ::= a root | "b"\na ::= "x"?', "left_recursion", 1, 1),
    "left recursion behind two empty rules": (
        'root ::= "s" a\na ::= e e a "x" | "y"\ne ::= f f\nf ::= "" | "z"',
        "left_recursion",
        2,
        1,
    ),
    "left recursion in a rule that is not used": ('root ::= "a"\nb ::= b "c" | "d"', "left_recursion", 2, 1),
    "a loop around nothing": ('root ::= ("a"*)*', "left_recursion", 1, 1),
    "a loop around a loop": ('root ::= "a"**', "left_recursion", 1, 1),
}


def _doubling(num_rules: int) -> str:
    rules = [f"r{i} ::= r{i + 1} | r{i + 1}" for i in range(num_rules)]
    return "\n".join(["root ::= r0", *rules, f'r{num_rules} ::= "a"'])


def _nested_pairs(num_rules: int) -> str:
    rules = [f'r{i} ::= "a" r{i + 1} "x" | "a" r{i + 1} "y"' for i in range(num_rules)]
    return "\n".join(["root ::= r0", *rules, f'r{num_rules} ::= "a"'])


BOMBS: dict[str, tuple[str, str]] = {
    "deep nesting": ("root ::= " + "(" * 8_000 + '"a"' + ")" * 8_000, "too_deep"),
    "120 KB of nesting": ("root ::= " + "(" * 60_000 + '"a"' + ")" * 60_000, "too_large"),
    "120 KB of rules": ("\n".join(f'r{i} ::= "a"' for i in range(9_000)), "too_large"),
    "a million repetitions": ('root ::= "a"{1000000}', "repetition"),
    "a number without an end": ('root ::= "a"{' + "9" * 5_000 + "}", "repetition"),
    "bounds upside down": ('root ::= "a"{5,2}', "repetition"),
    "nested repetitions": ("root ::= " + "(" * 9 + '"a"' + "{9})" * 9, "repetition"),
    "a long literal repeated": ('root ::= "' + "a" * 15_000 + '"{1999}', "too_large"),
    "many repetitions": ("root ::= " + "[a-z]{0,1999} " * 9, "too_large"),
    "stars in a row": ('root ::= "a"' + "*" * 15_000, "too_deep"),
    "2^40 ways to start": (_doubling(40), "too_ambiguous"),
    "a thousand ways to start": ("root ::= " + " | ".join(['"a"'] * 2_500), "too_ambiguous"),
    "an empty item often": ('root ::= x{0,1999}\nx ::= "a"?', "too_ambiguous"),
    "left recursion through a thousand rules": (
        "\n".join(["root ::= r0", *(f"r{i} ::= r{i + 1}" for i in range(900)), "r900 ::= r0"]),
        "left_recursion",
    ),
    "places doubled by brackets": (
        'root ::= expr\nexpr ::= term | term "+" expr\nterm ::= "x" | "(" expr ")"',
        "too_ambiguous",
    ),
    "places doubled by an item that may be missing": ('root ::= "(" root? root ")" | "x"', "too_ambiguous"),
    "places doubled by an item that may go on": (
        'root ::= p root "b" | "a" root "d" | "x"\np ::= "z" ("a" root "c")?\n',
        "too_ambiguous",
    ),
    "places doubled by loops side by side": ('root ::= s* s* "."\ns ::= "(" root ")"', "too_ambiguous"),
    "places doubled without recursion": (_nested_pairs(30), "too_ambiguous"),
    "brackets of classes": ("root ::= " + "[a" * 8_000, "syntax"),
}
