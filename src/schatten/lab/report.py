"""stub"""


def write_report(out):
    return out / "report.html"
