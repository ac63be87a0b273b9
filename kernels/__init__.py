"""The kernels. ``spec`` and ``plan`` are plain Python; every other module here imports triton."""
