class NoDeviceError(RuntimeError):
    pass


def run(minutes, out):
    raise NoDeviceError("x")
