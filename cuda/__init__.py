"""Numba-CUDA kernels, imported as ``refengine.cuda``: the fast twins of ``refengine.reference``."""

# NVIDIA's namespace package `cuda` (cuda.bindings, cuda.core: numba.cuda imports them) and this
# folder share a name. When Python starts in the repository's root, `import cuda` finds this folder
# first; extending the path lets NVIDIA's parts be found as well. Without it numba.cuda breaks.
__path__ = __import__("pkgutil").extend_path(__path__, __name__)
