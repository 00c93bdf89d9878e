"""Layers that model families share; together with `blade` what a model plugin imports. Imports torch."""

from blade.chunks import in_chunks
from blade.nn.config import DecoderConfig
from blade.nn.decoder import ChannelMixer, Decoder, FeedForward, Layer, Norm, SelfAttention, TokenMixer
from blade.nn.default_ops import DefaultOps
from blade.nn.dequantize import dequantize, expand_scales
from blade.nn.fused_experts import SplitExperts
from blade.nn.grouped import GroupedQuantization, Matrix
from blade.nn.keys import Keys
from blade.nn.loader import Loader
from blade.nn.mixture import Mixture, MixtureConfig, SharedExpert, load_experts
from blade.nn.rope import DynamicRope, LinearRope, Llama3Rope, LongRope, Rope, YarnRope
from blade.nn.rope_config import read_rope
from blade.nn.selected_weights import NamedWeights, SelectedWeights
from blade.nn.text_model import located, text_model

__all__ = [
    "ChannelMixer",
    "Decoder",
    "DecoderConfig",
    "DefaultOps",
    "DynamicRope",
    "FeedForward",
    "GroupedQuantization",
    "Keys",
    "Layer",
    "LinearRope",
    "Llama3Rope",
    "Loader",
    "LongRope",
    "Matrix",
    "Mixture",
    "MixtureConfig",
    "NamedWeights",
    "Norm",
    "Rope",
    "SelectedWeights",
    "SelfAttention",
    "SharedExpert",
    "SplitExperts",
    "TokenMixer",
    "YarnRope",
    "dequantize",
    "expand_scales",
    "in_chunks",
    "load_experts",
    "located",
    "read_rope",
    "text_model",
]
