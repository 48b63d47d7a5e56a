"""Speed and memory of cuflash beside its peers: `python -m benchmarks.forward`, `.backward`, `.memory`."""
