"""Gradient surgery for several losses, as optax transformations."""

import importlib.metadata

from optax_surgery.core import StackedRule, Surgery, SurgeryState, Tasks, Weighting
from optax_surgery.core import gradient_surgery, stacked_surgery

# Methods from the Gramian
from optax_surgery.methods.aligned_mtl import aligned_mtl
from optax_surgery.methods.cagrad import cagrad
from optax_surgery.methods.conflict_free import conflict_free
from optax_surgery.methods.cr_mogm import cr_mogm
from optax_surgery.methods.dualproj import dualproj
from optax_surgery.methods.fairgrad import fairgrad
from optax_surgery.methods.fedmgda import fedmgda
from optax_surgery.methods.geometric_median import geometric_median
from optax_surgery.methods.gradops import gradops
from optax_surgery.methods.gradvac import gradvac
from optax_surgery.methods.imtl_g import imtl_g
from optax_surgery.methods.inverse_norms import inverse_norms
from optax_surgery.methods.krum import krum
from optax_surgery.methods.mgda import mgda
from optax_surgery.methods.nash_mtl import nash_mtl
from optax_surgery.methods.ntkmtl import ntkmtl
from optax_surgery.methods.pcd import pcd
from optax_surgery.methods.pcgrad import pcgrad
from optax_surgery.methods.pivrg import pivrg
from optax_surgery.methods.upgrad import upgrad

# Methods from the losses
from optax_surgery.methods.dwa import dwa
from optax_surgery.methods.epo import epo
from optax_surgery.methods.famo import famo
from optax_surgery.methods.go4align import go4align
from optax_surgery.methods.gradnorm import gradnorm
from optax_surgery.methods.learnt_scales import imtl, imtl_l, uncertainty_weighting
from optax_surgery.methods.pmgda import pmgda
from optax_surgery.methods.random_weighting import random_weighting
from optax_surgery.methods.relobralo import relobralo
from optax_surgery.methods.scalarisations import cosmos, gls, pbi, scale_invariant, stch
from optax_surgery.methods.softadapt import softadapt

# Methods from the coordinates, or with a T x N average
from optax_surgery.methods.coordinate_median import coordinate_median
from optax_surgery.methods.db_mtl import db_mtl
from optax_surgery.methods.excess_mtl import excess_mtl
from optax_surgery.methods.graddrop import graddrop
from optax_surgery.methods.learning_rate_annealing import learning_rate_annealing
from optax_surgery.methods.moco import moco
from optax_surgery.methods.momentum_conflict_free import momentum_conflict_free
from optax_surgery.methods.sam_gs import sam_gs
from optax_surgery.methods.trimmed_mean import trimmed_mean

# Methods from two independent batches
from optax_surgery.methods.modo import modo
from optax_surgery.methods.sdmgrad import sdmgrad

# Baselines
from optax_surgery.methods.baselines import constant, mean
from optax_surgery.methods.baselines import sum as sum

# From losses to gradients and updates
from optax_surgery.gradients import explain_leaves, feature_surgery_value_and_grad, infer_shared
from optax_surgery.gradients import per_task_surgery_value_and_grad, per_task_value_and_grad
from optax_surgery.gradients import surgery_value_and_grad
from optax_surgery.gradients import task_value_and_grad

# Metrics of a Gramian
from optax_surgery.metrics import condition_number, conflict_fraction, cosine_similarities
from optax_surgery.metrics import magnitude_similarities, task_norms, update_alignment

# What solvers report in a method's state
from optax_surgery.algebra.solvers import SolverReport

# The two halves of a surgery, and the order of its rows
from optax_surgery.trees import combine, gramian, task_names

# Wrappers
from optax_surgery.wrappers.accumulate import accumulate
from optax_surgery.wrappers.apply import apply_updates
from optax_surgery.wrappers.monitor import MonitorState, monitor, scalars
from optax_surgery.wrappers.nonfinite import on_nonfinite
from optax_surgery.wrappers.schedule import every, start_after
from optax_surgery.wrappers.shared import leafwise, on_shared
from optax_surgery.wrappers.tasks import clip_tasks, move_state, normalize_tasks
from optax_surgery.wrappers.tasks import on_log_losses, on_tasks, per_task

__version__ = importlib.metadata.version("optax_surgery")

# All names above but `sum`, which in a star import would take the place of Python's.
__all__ = [
    "MonitorState",
    "SolverReport",
    "StackedRule",
    "Surgery",
    "SurgeryState",
    "Tasks",
    "Weighting",
    "accumulate",
    "aligned_mtl",
    "apply_updates",
    "cagrad",
    "clip_tasks",
    "combine",
    "condition_number",
    "conflict_fraction",
    "conflict_free",
    "constant",
    "coordinate_median",
    "cosine_similarities",
    "cosmos",
    "cr_mogm",
    "db_mtl",
    "dualproj",
    "dwa",
    "epo",
    "every",
    "excess_mtl",
    "explain_leaves",
    "fairgrad",
    "famo",
    "feature_surgery_value_and_grad",
    "fedmgda",
    "geometric_median",
    "gls",
    "go4align",
    "graddrop",
    "gradient_surgery",
    "gradnorm",
    "gradops",
    "gradvac",
    "gramian",
    "imtl",
    "imtl_g",
    "imtl_l",
    "infer_shared",
    "inverse_norms",
    "krum",
    "leafwise",
    "learning_rate_annealing",
    "magnitude_similarities",
    "mean",
    "mgda",
    "moco",
    "modo",
    "momentum_conflict_free",
    "monitor",
    "move_state",
    "nash_mtl",
    "normalize_tasks",
    "ntkmtl",
    "on_log_losses",
    "on_nonfinite",
    "on_shared",
    "on_tasks",
    "pbi",
    "pcd",
    "pcgrad",
    "per_task",
    "per_task_surgery_value_and_grad",
    "per_task_value_and_grad",
    "pivrg",
    "pmgda",
    "random_weighting",
    "relobralo",
    "sam_gs",
    "scalars",
    "scale_invariant",
    "sdmgrad",
    "softadapt",
    "stacked_surgery",
    "start_after",
    "stch",
    "surgery_value_and_grad",
    "task_names",
    "task_norms",
    "task_value_and_grad",
    "trimmed_mean",
    "uncertainty_weighting",
    "update_alignment",
    "upgrad",
]
