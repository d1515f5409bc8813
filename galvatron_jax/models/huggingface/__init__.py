"""Llama weights in Hugging Face's layout: ``config.json`` and safetensors, read part by part, written shard by shard.

A folder from the hub is a stranger's: nothing in it is executed, and only plain safetensors files inside it are opened.
Importing this imports neither jax nor flax.
"""

from ._config_json import config_text as config_text
from ._config_json import read_llama_config as read_llama_config
from ._read import StoredTensor as StoredTensor
from ._read import read_llama as read_llama
from ._write import write_llama as write_llama
