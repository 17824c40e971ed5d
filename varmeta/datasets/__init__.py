"""Data sets that are shipped, and made-up tasks.

Sources and licences: `data/LICENSES.md` beside this file.
"""

from varmeta.datasets.made import lines, polynomials, sinusoids
from varmeta.datasets.shipped import eight_schools, gapminder, radon, rats

__all__ = ["eight_schools", "gapminder", "lines", "polynomials", "radon", "rats", "sinusoids"]
