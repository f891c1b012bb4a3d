"""Gradient surgery for several losses, as optax transformations."""

from optax_surgery.core import SurgeryState as SurgeryState
from optax_surgery.core import Weighting as Weighting
from optax_surgery.core import WeightingUpdateFn as WeightingUpdateFn
from optax_surgery.core import gradient_surgery as gradient_surgery

# Methods from the Gramian
from optax_surgery.methods.aligned_mtl import aligned_mtl as aligned_mtl
from optax_surgery.methods.conflict_free import conflict_free as conflict_free
from optax_surgery.methods.cr_mogm import cr_mogm as cr_mogm
from optax_surgery.methods.gradops import gradops as gradops
from optax_surgery.methods.gradvac import gradvac as gradvac
from optax_surgery.methods.imtl_g import imtl_g as imtl_g
from optax_surgery.methods.krum import krum as krum
from optax_surgery.methods.ntkmtl import ntkmtl as ntkmtl
from optax_surgery.methods.pcgrad import pcgrad as pcgrad

# Baselines
from optax_surgery.methods.baselines import constant as constant
from optax_surgery.methods.baselines import mean as mean
from optax_surgery.methods.baselines import sum as sum

# Metrics of a Gramian
from optax_surgery.metrics import condition_number as condition_number
from optax_surgery.metrics import conflict_fraction as conflict_fraction
from optax_surgery.metrics import cosine_similarities as cosine_similarities
from optax_surgery.metrics import magnitude_similarities as magnitude_similarities
from optax_surgery.metrics import task_norms as task_norms
from optax_surgery.metrics import update_alignment as update_alignment

# The two halves of a surgery
from optax_surgery.trees import combine as combine
from optax_surgery.trees import gramian as gramian

# Wrappers
from optax_surgery.wrappers import MonitorState as MonitorState
from optax_surgery.wrappers import monitor as monitor
