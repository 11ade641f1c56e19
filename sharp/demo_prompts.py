"""The eight conversations of the demo, from a few tokens to over a thousand. Text only; knows no model."""

from __future__ import annotations

ESSAY = """\
A language model answers one token at a time. To produce a token it reads every weight it has, multiplies \
them with a short vector, and throws almost all of that work away: one number of the result, the \
identifier of the likeliest next token, is kept. Then it starts again. For a single reader this is a \
strange way to use a machine. The weights of even a small model are a few hundred megabytes, those of a \
large one a few hundred gigabytes, and all of them travel from memory to the arithmetic units for each \
syllable of the answer. The arithmetic units wait most of the time. They could multiply hundreds of \
vectors with the same weights in the same time, because what takes the time is the journey of the weights \
and not the multiplication.

This is why people who run such models put requests together. If eight people ask something at the same \
moment, their eight vectors can share one journey of the weights. The machine works hardly any longer than \
for one of them, and everybody has an answer. The idea is old: a ferry does not cross the river for each \
passenger, and a baker does not heat the oven for each loaf. What is new is that the passengers here have \
luggage of very different sizes, and that nobody knows in advance how far each of them wants to go.

The first systems solved this in the way a spreadsheet would. They wrote the requests under each other as \
rows of a table, one token in each cell, and filled the short rows with blanks up to the length of the \
longest. A table is a rectangle, and rectangles are what the usual libraries understand. But consider a \
morning on which seven people ask for the capital of a country and the eighth pastes a long report and \
asks for a summary. The seven questions have ten tokens each, the report has a thousand. The rectangle has \
eight thousand cells, of which fewer than one thousand and one hundred hold anything. The machine \
multiplies the blanks as diligently as the words. Seven eighths of its work is done for nobody, and the \
seven people with their short questions wait for all of it.

There was a second waste, in time instead of space. A table is finished when its longest row is finished. \
Somebody who asked for a single word had it after the first step, but his row stayed in the table, blank, \
while his neighbour's long story went on, and a ninth person who arrived in the meantime stood at the door \
until the whole table was done. It was as if a restaurant admitted guests only when every table had been \
cleared, and served nobody until the slowest eater of the last round had put down the spoon.

Both wastes have the same cure, which is to stop thinking in tables. What the weights need is a stack of \
vectors; they do not care which of them belongs to whom. So a step of the machine can be a plain list: \
from this request a thousand tokens of its question, from that one ten, from five others the one token \
that each of them produced a moment ago. The lists are laid end to end with no blanks between them. Only \
one operation, the one called attention, has to know where one request ends and the next begins, because \
in it a token looks back at the earlier tokens of its own conversation, and must not see those of a \
stranger. It is given a second short list, of the places where the conversations begin, and that is \
enough. When a request is done its tokens simply stop appearing in the list, and a new one takes its place \
in the very next step. Nobody waits for the slowest eater.

What a token looks back at has to be stored somewhere. For each token of each conversation the machine \
keeps a few thousand numbers, the keys and the values, and these soon take more room than anything but the \
weights. The old way was to reserve for each conversation the room that it might need at most. Most \
conversations end early, and so most of that room was never used, just as a hotel would stand half empty \
if every guest had to book all the nights on which he might conceivably stay. The better way was found in \
the oldest trick of operating systems. Memory is cut into pages of equal size, say sixty-four tokens each; \
a conversation has a small table that says which pages it owns; when it grows past the end of its last \
page it is given another, from anywhere; and when it ends its pages go back to the pile. Nothing is \
reserved that is not used, up to the last few tokens of a page, and more conversations fit into the same \
machine, which means larger stacks of vectors and better use of every journey of the weights.

There remains a question of manners. A report of a hundred thousand tokens, taken into one step, would \
keep everybody else waiting for as long as that step takes, and the people in the middle of their answers \
would see the words stop. So there is a budget: a step takes so many tokens and no more. The running \
answers come first, since they need one token each and somebody is reading them at this moment; what is \
left of the budget goes to the long questions, a piece at a time. The long question then needs several \
steps before its answer begins, which its author will hardly notice, while all the others go on without a \
pause. How large the budget should be is a matter of measurement. Too small, and the journey of the \
weights is shared by too few; too large, and the steps become slow for those who only wait for a word.

None of this changes an answer. Each conversation gets exactly the words that it would have had alone in \
the machine, and it should get them with the same certainty whether its neighbours are many or few. It is \
easy to lose this property by accident, because adding the same numbers in another order gives a slightly \
different sum, and a library may choose the order by the size of the stack. Those who take care of it are \
rewarded whenever something has to be investigated: a result that can be repeated can be understood."""

QUESTIONS = (
    "Hi!",
    "What is the capital of France?",
    "Name three primary colours.",
    "Write a short poem about a lighthouse in winter, and make the last line about the keeper's cat.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "I have two apples and a friend gives me three more, then I eat one on the way home. My sister takes "
    "half of what is left and gives one of hers back. How many apples do I have now? Explain each step in "
    "a sentence.",
    "Explain to a curious ten-year-old why the sky is blue during the day, why it turns red in the "
    "evening, and why it is black at night even though there are so many stars. Use one picture from "
    "everyday life for each of the three, avoid numbers, and end with a question that invites the child "
    "to look out of the window tonight.",
    f"Summarise the following essay in three sentences.\n\n{ESSAY}",
)


def demo_conversations() -> list[list[dict[str, str]]]:
    """Eight conversations of one user message each, as chat templates take them."""
    return [[{"role": "user", "content": question}] for question in QUESTIONS]
