"""Build of the example extension: `python setup.py build_ext --inplace`, where cbn, cython and setuptools are there."""

from Cython.Build import cythonize
from setuptools import setup

setup(name="frames", ext_modules=cythonize("frames.pyx", language_level=3))
