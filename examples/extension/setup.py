"""Build of the example extension: `python setup.py build_ext --inplace`, where cbn, cython and setuptools are there."""

from pathlib import Path

from Cython.Build import cythonize
from setuptools import setup

import cbn

# Where cbn's .pxd is: Cython looks in the folders of sys.path, which an editable install is not in
folder = Path(cbn.__file__).parents[1]
setup(name="frames", ext_modules=cythonize("frames.pyx", language_level=3, include_path=[str(folder)]))
