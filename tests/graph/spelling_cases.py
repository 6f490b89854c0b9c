"""What every op of the table is called with, and which canonical arguments that must give.

Cases of one topic stand together in a ``cases_*.py`` file beside this one.
"""

from __future__ import annotations

from typing import Final

from tests.graph.cases_averages import AVERAGES
from tests.graph.cases_matmul import MATMULS
from tests.graph.cases_moves import MOVES
from tests.graph.cases_pointwise import POINTWISE
from tests.graph.cases_views import VIEWS
from tests.graph.cases_weights import WEIGHTS
from tests.graph.spelling import Case

CASES: Final[dict[str, Case]] = {
    **WEIGHTS,
    **POINTWISE,
    **MATMULS,
    **VIEWS,
    **MOVES,
    **AVERAGES,
}
