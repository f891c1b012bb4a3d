"""Gradient surgery for several losses, as optax transformations."""

from optax_surgery.core import SurgeryState as SurgeryState
from optax_surgery.core import Weighting as Weighting
from optax_surgery.core import WeightingUpdateFn as WeightingUpdateFn
from optax_surgery.core import gradient_surgery as gradient_surgery

# Methods from the Gramian
from optax_surgery.methods.aligned_mtl import aligned_mtl as aligned_mtl
from optax_surgery.methods.cagrad import cagrad as cagrad
from optax_surgery.methods.conflict_free import conflict_free as conflict_free
from optax_surgery.methods.cr_mogm import cr_mogm as cr_mogm
from optax_surgery.methods.dualproj import dualproj as dualproj
from optax_surgery.methods.fairgrad import fairgrad as fairgrad
from optax_surgery.methods.geometric_median import geometric_median as geometric_median
from optax_surgery.methods.gradops import gradops as gradops
from optax_surgery.methods.gradvac import gradvac as gradvac
from optax_surgery.methods.imtl_g import imtl_g as imtl_g
from optax_surgery.methods.krum import krum as krum
from optax_surgery.methods.mgda import mgda as mgda
from optax_surgery.methods.nash_mtl import nash_mtl as nash_mtl
from optax_surgery.methods.ntkmtl import ntkmtl as ntkmtl
from optax_surgery.methods.pcd import pcd as pcd
from optax_surgery.methods.pcgrad import pcgrad as pcgrad
from optax_surgery.methods.pivrg import pivrg as pivrg
from optax_surgery.methods.upgrad import upgrad as upgrad

# Methods from the losses
from optax_surgery.methods.scalarisations import cosmos as cosmos
from optax_surgery.methods.dwa import dwa as dwa
from optax_surgery.methods.famo import famo as famo
from optax_surgery.methods.scalarisations import gls as gls
from optax_surgery.methods.go4align import go4align as go4align
from optax_surgery.methods.gradnorm import gradnorm as gradnorm
from optax_surgery.methods.learnt_scales import imtl as imtl
from optax_surgery.methods.learnt_scales import imtl_l as imtl_l
from optax_surgery.methods.scalarisations import pbi as pbi
from optax_surgery.methods.random_weighting import random_weighting as random_weighting
from optax_surgery.methods.scalarisations import scale_invariant as scale_invariant
from optax_surgery.methods.scalarisations import stch as stch
from optax_surgery.methods.learnt_scales import uncertainty_weighting as uncertainty_weighting

# Methods from the coordinates, or with a T x N average
from optax_surgery.methods.coordinate_median import coordinate_median as coordinate_median
from optax_surgery.methods.db_mtl import db_mtl as db_mtl
from optax_surgery.methods.excess_mtl import excess_mtl as excess_mtl
from optax_surgery.methods.graddrop import graddrop as graddrop
from optax_surgery.methods.moco import moco as moco
from optax_surgery.methods.momentum_conflict_free import (
    momentum_conflict_free as momentum_conflict_free,
)
from optax_surgery.methods.trimmed_mean import trimmed_mean as trimmed_mean

# Methods from two independent batches
from optax_surgery.methods.modo import modo as modo
from optax_surgery.methods.sdmgrad import sdmgrad as sdmgrad

# Baselines
from optax_surgery.methods.baselines import constant as constant
from optax_surgery.methods.baselines import mean as mean
from optax_surgery.methods.baselines import sum as sum

# From losses to gradients
from optax_surgery.gradients import (
    feature_surgery_value_and_grad as feature_surgery_value_and_grad,
)
from optax_surgery.gradients import infer_shared as infer_shared
from optax_surgery.gradients import per_task_value_and_grad as per_task_value_and_grad
from optax_surgery.gradients import surgery_value_and_grad as surgery_value_and_grad
from optax_surgery.gradients import task_value_and_grad as task_value_and_grad

# Metrics of a Gramian
from optax_surgery.metrics import condition_number as condition_number
from optax_surgery.metrics import conflict_fraction as conflict_fraction
from optax_surgery.metrics import cosine_similarities as cosine_similarities
from optax_surgery.metrics import magnitude_similarities as magnitude_similarities
from optax_surgery.metrics import task_norms as task_norms
from optax_surgery.metrics import update_alignment as update_alignment

# What solvers report in a method's state
from optax_surgery.solvers import SolverReport as SolverReport

# The two halves of a surgery
from optax_surgery.trees import combine as combine
from optax_surgery.trees import gramian as gramian

# Wrappers
from optax_surgery.wrappers import MonitorState as MonitorState
from optax_surgery.wrappers import accumulate as accumulate
from optax_surgery.wrappers import apply_updates as apply_updates
from optax_surgery.wrappers import every as every
from optax_surgery.wrappers import leafwise as leafwise
from optax_surgery.wrappers import monitor as monitor
from optax_surgery.wrappers import normalize_tasks as normalize_tasks
from optax_surgery.wrappers import on_nonfinite as on_nonfinite
from optax_surgery.wrappers import on_shared as on_shared
from optax_surgery.wrappers import per_task as per_task
from optax_surgery.wrappers import start_after as start_after
