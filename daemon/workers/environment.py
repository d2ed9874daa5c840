"""What children see of the daemon's environment: a list of what they need, and nothing else.

A deny-list would have to know the name of every secret that a user may have exported. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

# The interpreter, the C library and OpenSSL (an upstream's certificate may be signed by the user's
# own authority), then what the engines and GPU drivers read.
_NAMES = frozenset(
    """
    PATH HOME USER LOGNAME LANG LANGUAGE TZ TMPDIR VIRTUAL_ENV LD_LIBRARY_PATH SYSTEMROOT
    SSL_CERT_FILE SSL_CERT_DIR
    """.split()
)
_PREFIXES = tuple(
    """
    LC_ PYTHON DYLD_ MALLOC_ OMP_ GOMP_ KMP_ MKL_ OPENBLAS_ GGML_ LLAMA_ ORT_ CUDA NVIDIA_ HIP_ HSA_
    ROCR_ GPU_ VK_ SYCL_ ONEAPI_ ZE_ METAL_
    """.split()
)
# What engines get unless the user has set it. llama.cpp's threads (GNU OpenMP) spin while they wait
# for each other, which keeps the awaited one from running where others want the cores too. Tokens a
# second of SmolLM2-135M on 2 cores, by libgomp's default and with this: 2 threads alone 87-108 and
# 74-102, beside busy programs 3-18 and 14-27; two models of 2 threads each 9-20 and 29-33 together.
# CUDA's own order of GPUs is by speed; by address it is the one that the system has too.
DEFAULTS: Mapping[str, str] = {"GOMP_SPINCOUNT": "1000", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
# The fetcher talks to the hub for the user: with their token, through their proxy.
_FETCHER_NAMES = frozenset(
    """
    HF_TOKEN HF_HOME HF_HUB_CACHE HF_TOKEN_PATH HF_ENDPOINT HF_HUB_OFFLINE XDG_CACHE_HOME
    HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY REQUESTS_CA_BUNDLE CURL_CA_BUNDLE
    """.split()
)
_SECRET_WORDS = ("TOKEN", "SECRET", "PASSW", "CREDENTIAL", "_KEY")


def for_engines(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what workers and probers see."""
    return dict(DEFAULTS) | {
        name: value
        for name, value in environment.items()
        if (name in _NAMES or name.startswith(_PREFIXES))
        and not any(word in name for word in _SECRET_WORDS)
    }


def for_fetcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a fetcher sees: the same, and what it needs to be let in and out."""
    network = {k: v for k, v in environment.items() if k.upper() in _FETCHER_NAMES}
    return for_engines(environment) | network
