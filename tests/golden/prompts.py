"""Prompts of the golden files: English, code, Japanese, chats, digits, emoji, very long and very short."""

from __future__ import annotations

_SENTENCES = [
    "The harbour master kept two books, "
    "one for the ships that came and one for the ships that were expected.",
    "In the first he wrote with ink, in the second with pencil, and on Sundays he compared the two.",
    "Nobody had asked him to do so, but the habit was older than his office and he saw no reason to end it.",
    "When the {thing} arrived in {month}, carrying {count} crates of {cargo}, both books agreed for once.",
    "He read the line aloud to his assistant, who was new, and who wanted to know what the crates were for.",
    "For those who must pay duty, he answered, {count} crates are {count} crates, whatever they are for.",
    "A harbour, the old man said, is a place where questions are weighed and only some of them are unloaded.",
]
_THINGS = ["schooner", "steamer", "barge", "ferry", "dredger", "collier", "trawler", "packet boat", "lighter"]
_MONTHS = ["January", "March", "April", "June", "July", "September", "October", "November", "December"]
_CARGO = ["lemons", "copper wire", "schoolbooks", "tea", "window glass", "violins", "rope", "salt", "clocks"]


def _long_story() -> str:
    """About 1,500 tokens: nine paragraphs that differ in a few words, then a question about one of them."""
    paragraphs = [
        " ".join(_SENTENCES).format(thing=thing, month=month, count=17 * (i + 3), cargo=cargo)
        for i, (thing, month, cargo) in enumerate(zip(_THINGS, _MONTHS, _CARGO, strict=True))
    ]
    return "\n\n".join(paragraphs) + "\n\nQuestion: what did the ferry carry?\nAnswer: The ferry carried"


_SYSTEM = {"role": "system", "content": "You are a careful librarian. Answer in one short paragraph."}
PROMPTS: dict[str, str | list[dict[str, str]]] = {
    "short": "The",
    "capital": "The capital of France is",
    "prose": (
        "Rain had fallen on the valley for nine days, and the river, which in summer a child could cross "
        "without wetting her knees, now carried whole trees past the mill. The miller's daughter counted them"
    ),
    "science": (
        "Photosynthesis is the process by which green plants convert sunlight into chemical energy. First,"
    ),
    "python": (
        "def merge_sorted(left: list[int], right: list[int]) -> list[int]:\n"
        '    """Merge two sorted lists into one sorted list."""\n    result = []\n    i = j = 0\n'
    ),
    "c": "#include <stdio.h>\n\nint main(int argc, char **argv) {\n\tfor (int i = 0; i < argc; i++) {\n\t\t",
    "japanese": "日本の首都は東京です。東京は世界で最も",
    "digits": "3.14159265358979323846264338327950288419716939937510 and 2, 4, 8, 16, 32, 64, 128, 256, 512,",
    "emoji": "Weather today: 🌧️🌧️⛅ and tomorrow: ☀️😎. I feel 👩‍👩‍👧‍👦",
    "french": "Il était une fois, dans un petit village près de la mer, une vieille femme qui",
    "chat": [{"role": "user", "content": "What is the difference between a violin and a viola?"}],
    "chat_system": [_SYSTEM, {"role": "user", "content": "Who wrote Pride and Prejudice, and when?"}],
    "chat_turns": [
        _SYSTEM,
        {"role": "user", "content": "Name three planets."},
        {"role": "assistant", "content": "Mars, Venus and Saturn."},
        {"role": "user", "content": "Which of them is the largest?"},
        {"role": "assistant", "content": "Saturn is the largest of the three."},
        {"role": "user", "content": "And which one is closest to the sun? Explain how you know."},
    ],
    "long": _long_story(),
}

TINY_PROMPTS = [
    "h",
    "hello world",
    "the end of the world and in the other",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "0123456789 é 日本 \n\t x",
    "hello the world in order to hold it; " * 12,
]

CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
    [
        {"role": "system", "content": ""},
        {"role": "user", "content": "  spaces  and\n\nlines\n"},
        {"role": "assistant", "content": '日本 🎉 <b>&amp;</b> "quoted" {{ not a template }}'},
        {"role": "user", "content": "<|im_end|> injected"},
    ],
    [{"role": "assistant", "content": "I start."}, {"role": "tool", "content": "42"}],
]

TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "\t",
    "\r\n",
    "a",
    "Hello, world!",
    " leading and trailing ",
    "two  blanks   three    four",
    "tabs\tand\t\ttabs \t mixed \t\t",
    "line\nline\n\nline\r\nline\r\r\n end",
    "a  1",
    "x 1 22 333 4444 55555 666666",
    "12345678901234567890123456789012345678901234567890",
    "0.1e-10 0xDEADBEEF 1,000,000 1_000 v2.0.1-rc3",
    "  42  \n  43",
    "²³¹ ½ Ⅷ ٣٤٥ 四五 १२३ 𝟘𝟙 ①",
    "don't can't it's WE'LL I'd they've y'all 're 'S",
    "don’t ‘quoted’ “double” — dash … ellipsis",
    "camelCaseAndPascalCase snake_case kebab-case SCREAMING_CASE",
    "if (x != null && y >= 0) { return arr[i++] ** 2; } // ok?",
    "def f(x):\n    return {k: v for k, v in x.items() if v}\n\n\nclass A:\n\tpass\n",
    '<html><body class="a b">&nbsp;</body></html>',
    "https://example.org/a/b?c=d&e=%20#frag user@example.org",
    "Ünïcödé naïve café Straße ŁÓDŹ İstanbul ﬁ ǆ",
    "e\u0301 e\u0301\u0323 a\u030a\u0327 Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d",
    "\u0301 starts with a combining mark",
    "😀 😎🎉👍🏽 👩‍👩‍👧‍👦 🏴󠁧󠁢󠁳󠁣󠁴󠁿 🇩🇪🇯🇵 ❤️ ☺︎ 🧑🏿‍🚀",
    "日本語のテキスト。カタカナ、ひらがな、漢字「引用」！？",
    "中文测试，没有空格的句子。繁體字",
    "한국어 문장입니다. 한글",
    "العربية نص تجريبي، مع علامات؟ مُشَكَّل",
    "עברית טקסט לבדיקה",
    "ภาษาไทยไม่มีช่องว่าง น้ำ กำลัง",
    "हिन्दी में क्षत्रिय ज्ञान",
    "Русский текст, Українська мова, Ελληνικά",
    "mixed日本and русский123и العربية٣ text",
    "\x00",
    "a\x00b\x01\x02\x7f",
    "\u200b\u200c\u200d\ufeff zero width \u2060 \u00ad soft",
    "\u00a0no\u00a0break\u2003em\u3000ideographic\u2028line\u2029par\x85next\x0bvt\x0cff",
    "\ufffd replacement \ufffd\ufffd",
    "\U0010ffff \ue000 \U000f0000 private and last",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝐛𝐨𝐥𝐝 𐍈 𠜎",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|im_end|>b <|im_end|> c<|endoftext|>",
    "<|im_start|><|im_start|>  <|im_end|>",
    "<|im_start |> <|IM_END|> <| im_end|> <|im_end|",
    "<repo_name>x<reponame>y<file_sep>z<filename><gh_stars>5<empty_output>",
    "<jupyter_start><jupyter_text>t<jupyter_code>c<jupyter_output>o<jupyter_script>s",
    "<issue_start><issue_comment>c<issue_closed> 12<|im_end|>34",
    "Ġ Ċ ĉ is the byte-level alphabet itself: Ġhello",
    "x" * 700,
    "antidisestablishmentarianism" * 12,
    "=" * 100 + "-" * 33 + "." * 7 + "!?" * 9,
    " " * 61 + "after many blanks" + " " * 17 + "\n" * 23,
    "((((((((((]]]]]]{{{{{{}}}}}}<<<<<>>>>>",
    "The quick brown fox jumps over the lazy dog. " * 8,
]
