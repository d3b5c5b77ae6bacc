"""Exercises that grade themselves: implement, account, find the bug, measure.

    from minidsv3.exercises import check, use

    check("rms_norm", RMSNorm)   # one line a property: holds, or fails with the smallest case and a hint; the points
    use("rms_norm", RMSNorm)     # then the whole model trains with it

One file an exercise, ``exNN_name.py``, holds its properties; the notebooks that ask the questions are made from
``notebooks/exercises/source``. `exercise` says what a property is, `calling` calls code that may do anything,
`checker` runs and prints, `gradients`, `numeric` and `planted` are the three forms that many exercises share, `golden`
reads the stored cases, `training` puts a solution into the model, `sources` makes the notebooks, `classroom` grades.

Simplified: the checks run in the student's own process. They catch what is wrong and what is borrowed, not an attack.
"""

from .checker import check, measured
from .planted import Finding
from .training import use

__all__ = ["Finding", "check", "measured", "use"]
