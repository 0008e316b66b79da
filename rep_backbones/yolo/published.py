"""What was published of the networks whose YAMLs this package carries, beside what is counted of them in docs/models.md.

Parameters were counted from the authors' own code. Accuracies and speeds are the authors', with their heads, training and
machines; classifiers have 1000 classes.
"""

from __future__ import annotations


def _yolov6(backbone: str, neck: str, ap: float, fps: int) -> str:
    return f"backbone {backbone} and neck {neck} parameters; AP {ap}, {fps} FPS on a T4 in FP16"


def _yolov6_p6(parameters: str, ap: float) -> str:
    return f"{parameters} parameters deployed with the authors' head; AP {ap} at 1280 pixels"


def _classifier(training: str, deployed: str, top1: str = "") -> str:
    return f"as a classifier {training} → {deployed} parameters" + (f", top-1 {top1}" if top1 else "")


# by the name of the YAML without its ending
PUBLISHED = {
    # Li et al., "YOLOv6 v3.0", 2023; in training form
    "efficientrep-n": _yolov6("3,435,296", "1,193,952", 37.5, 779),
    "efficientrep-s": _yolov6("13,712,960", "4,759,488", 45.0, 339),
    "efficientrep-m": _yolov6("25,716,780", "8,243,052", 50.0, 175),
    "efficientrep-l": _yolov6("38,472,533", "14,490,520", 52.8, 98),
    "efficientrep6-n": _yolov6_p6("10.4 M", 44.9),
    "efficientrep6-s": _yolov6_p6("41.4 M", 50.3),
    "efficientrep6-m": _yolov6_p6("79.6 M", 55.2),
    "efficientrep6-l": _yolov6_p6("140.4 M", 57.2),
    # Wang et al., "YOLOv7", CVPR 2023; in training form
    "yolov7-tiny": "5,997,856 parameters before the head",
    "yolov7": "37,162,400 parameters before the head; AP 51.4",
    "yolov7x": "70,772,424 parameters before the head",
    # Ding et al., "RepVGG", CVPR 2021
    "repvgg-a0": _classifier("9,108,968", "8,309,384", "72.41"),
    "repvgg-a0-cls": _classifier("9,108,968", "8,309,384", "72.41"),
    "repvgg-a1": _classifier("14,092,264", "12,789,864", "74.46"),
    "repvgg-a2": _classifier("28,210,600", "25,499,944", "76.48"),
    "repvgg-b0": _classifier("15,817,960", "14,339,048", "75.14"),
    "repvgg-b1": _classifier("57,415,016", "51,829,480", "78.37"),
    "repvgg-b1g2": _classifier("45,782,376", "41,360,104", "77.78"),
    "repvgg-b1g4": _classifier("39,966,056", "36,125,416", "77.58"),
    "repvgg-b2": _classifier("89,022,376", "80,315,112", "78.78"),
    "repvgg-b2g2": _classifier("70,846,376", "63,956,712"),
    "repvgg-b2g4": _classifier("61,758,376", "55,777,512"),
    "repvgg-b3": _classifier("123,085,288", "110,960,872"),
    "repvgg-b3g2": _classifier("96,911,848", "87,404,776"),
    "repvgg-b3g4": _classifier("83,825,128", "75,626,728"),
    "repvgg-d2se": _classifier("133,334,836", "120,387,572"),
    # Vasu et al., "MobileOne", CVPR 2023
    "mobileone-s0": _classifier("5,293,272", "2,078,504"),
    "mobileone-s1": _classifier("4,825,192", "4,764,840"),
    "mobileone-s2": _classifier("7,884,648", "7,808,168"),
    "mobileone-s3": _classifier("10,170,600", "10,078,312"),
    "mobileone-s4": _classifier("14,951,248", "14,838,352"),
}
