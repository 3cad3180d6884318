"""Published numbers for retrieval with long texts, from the LoTLIP paper."""

# Benchmark -> R@1 in percent, image to text and text to image.
Published = dict[str, tuple[float, float]]

PAPER = "LoTLIP (NeurIPS 2024), https://arxiv.org/abs/2410.05249"
# Benchmark -> column of the paper's table; model and number of training pairs -> row of the table.
PAPER_COLUMNS = {"dci": "DCI", "iiw": "IIW", "sharegpt4v-10k": "SV-10k", "urban1k": "Urban-1k"}
PUBLISHED: dict[str, Published] = {
    "CLIP ViT-B/32, 400M pairs": {
        "dci": (43.06, 40.32),
        "iiw": (86.76, 84.15),
        "sharegpt4v-10k": (58.08, 51.77),
        "urban1k": (60.90, 47.00),
    },
    "CLIP ViT-B/16, 400M pairs": {
        "dci": (45.45, 43.01),
        "iiw": (88.24, 87.58),
        "sharegpt4v-10k": (60.22, 56.16),
        "urban1k": (67.10, 52.90),
    },
    "Long-CLIP ViT-B/16, 400M pairs": {
        "dci": (51.68, 57.28),
        "iiw": (89.61, 93.20),
        "sharegpt4v-10k": (79.24, 77.06),
        "urban1k": (78.90, 79.50),
    },
    "LoTLIP ViT-B/32, 100M pairs": {
        "dci": (59.90, 56.36),
        "iiw": (93.14, 91.83),
        "sharegpt4v-10k": (83.76, 78.97),
        "urban1k": (84.10, 81.80),
    },
    "LoTLIP ViT-B/16, 100M pairs": {
        "dci": (64.11, 62.63),
        "iiw": (94.28, 92.65),
        "sharegpt4v-10k": (88.40, 82.72),
        "urban1k": (88.80, 84.80),
    },
}
