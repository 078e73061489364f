def report(f):
    return ""
