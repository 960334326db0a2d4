"""The libraries that take seconds to import and that most examples need; whoever is forked after this has them."""
# ruff: noqa: F401  they are loaded, not used
import httpx
import IPython
import ipywidgets
import jupyter_client
import matplotlib.pyplot
import matplotlib_inline.backend_inline
import nbconvert
import nbdev.test
import pandas
import papermill
import pyarrow.parquet
import scipy.optimize
import sklearn.linear_model
import sklearn.metrics
import sklearn.model_selection
import typer

from nbs_lib.core.light_imports import load_vision

load_vision()
