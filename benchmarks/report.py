"""placeholder"""
def write(path):
    return path
