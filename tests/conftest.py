"""Fixtures for all tests."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import torch
from compilation import quick_compilation
from picture_folders import dreambooth_dir
from sd_scripts_copies import tree
from tiny_models import tiny_sd1, tiny_sd2, tiny_sdxl

__all__ = ["dreambooth_dir", "tiny_sd1", "tiny_sd2", "tiny_sdxl", "tree"]

# The tensors are tiny: a second thread gains nothing, and on a busy machine costs ten times more.
torch.set_num_threads(1)

# What is kept of the tests' pictures goes with the session, and not into the user's own cache.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="hina-cache-")
# Compiled optimizers are shared by the processes that run the tests: the first one's is inherited.
if "HINA_CACHE" not in os.environ:
    os.environ["HINA_CACHE"] = os.path.join(os.environ["XDG_CACHE_HOME"], "compiled")
if "HINA_CXXFLAGS" not in os.environ:
    os.environ["HINA_CXXFLAGS"] = quick_compilation(Path(os.environ["XDG_CACHE_HOME"]))
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
