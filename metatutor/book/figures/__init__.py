"""Every picture and table of the book, in one style; the only place that draws.

Each function returns a figure that a notebook shows by naming it, as crisp SVG, about as wide as a phone at its natural
size, in colours that colour-blind readers can tell apart. Images are `[height, width]`, 0 (paper) to 1 (ink).
"""

from metatutor.book.figures.acting import movable_goal, walks
from metatutor.book.figures.alphabet import drawn_alphabet
from metatutor.book.figures.compare import cost, differences, places
from metatutor.book.figures.concepts import families
from metatutor.book.figures.curves import bands, by_layer, certainty, intervals, learning_curve, lines, slopes
from metatutor.book.figures.filling import filling_memory
from metatutor.book.figures.images import adaptation, answers, characters, redrawn, task
from metatutor.book.figures.interactive import movable_plane
from metatutor.book.figures.memory import attention_on_support, fast_weights, memory_steps, usage_over_time
from metatutor.book.figures.metric import confusions, embedding, matrices, plane
from metatutor.book.figures.optimization import beginnings, heat, journeys
from metatutor.book.figures.redraw import drawn_again
from metatutor.book.figures.shown import Shown, live, stepper, table
from metatutor.book.figures.style import COLOURS, Picture
from metatutor.book.figures.waves import adapting_wave, waves

__all__ = [
    "COLOURS",
    "Picture",
    "Shown",
    "adaptation",
    "adapting_wave",
    "answers",
    "attention_on_support",
    "bands",
    "beginnings",
    "by_layer",
    "certainty",
    "characters",
    "confusions",
    "cost",
    "differences",
    "drawn_again",
    "drawn_alphabet",
    "embedding",
    "families",
    "fast_weights",
    "filling_memory",
    "heat",
    "intervals",
    "journeys",
    "learning_curve",
    "lines",
    "live",
    "matrices",
    "memory_steps",
    "movable_goal",
    "movable_plane",
    "places",
    "plane",
    "redrawn",
    "slopes",
    "stepper",
    "table",
    "task",
    "usage_over_time",
    "walks",
    "waves",
]
