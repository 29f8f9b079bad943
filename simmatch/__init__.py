"""Similarity matching: layers that learn from local rules, with dynamics solved to a certified residual."""

from simmatch.config import ConfigError, DynamicsConfig, LayerConfig, ModelConfig, PlasticityConfig
from simmatch.encoder import feedforward_encoder
from simmatch.fit import Trainer, fit_stack
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.layer_1d import SimilarityMatchingConv1d
from simmatch.model import Stack, load_model, save_model
from simmatch.observer import Observer, Update
from simmatch.plasticity import Statistics
from simmatch.profile import Profile
from simmatch.solvers.dynamics import Solution
from simmatch.solvers.quadratic import ConvergenceWarning, solve

__all__ = [
    "ConfigError",
    "ConvergenceWarning",
    "DynamicsConfig",
    "LayerConfig",
    "ModelConfig",
    "Observer",
    "PlasticityConfig",
    "Profile",
    "SimilarityMatchingConv1d",
    "SimilarityMatchingConv2d",
    "Solution",
    "Stack",
    "Statistics",
    "Trainer",
    "Update",
    "feedforward_encoder",
    "fit_stack",
    "load_model",
    "save_model",
    "solve",
]
