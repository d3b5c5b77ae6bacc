"""What has to happen once before any test is read."""

import warnings

with warnings.catch_warnings():
    # On a fresh machine the first import writes matplotlib's list of fonts, without naming an encoding: under
    # PYTHONWARNDEFAULTENCODING=1, where warnings are errors, that would fail the first test that draws.
    warnings.simplefilter("ignore")
    import matplotlib.font_manager  # noqa: F401
