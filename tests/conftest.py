"""Fixtures for all tests."""

import atexit
import os
import shutil
import tempfile

import torch
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
# Some three hundred programs are compiled, most of them for tiny tensors: this halves the time.
os.environ.setdefault("HINA_CXXFLAGS", "-O1")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
