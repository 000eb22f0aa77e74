"""Ten epochs of MNIST and 100 of the sample, without one ingredient of the recipe at a time.

    python tests/recipe.py DATA_DIR

Each ingredient is left out by a change in the text of mnist_autoencoder.py.
"""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np

SCRIPT = Path(__file__).resolve().parent.parent / "mnist_autoencoder.py"
LEFT_OUT = {
    "nothing": (),
    "Nesterov's look-ahead": ("-= lr * (g + v)", '-= lr * v / run.settings["momentum"]'),
    "momentum 0.98 (0.9)": ('["momentum"]', '["momentum"] * 0.9 / 0.98'),
    "centred input": ("[images - self.mean_image]", "[images]"),
    "output weights at zero (He's)": ("in self.weights[:-1]:", "in self.weights:"),
    "output biases at the mean image (0)": ("= np.log(mean / (1 - mean))", "= 0"),
    "warm-up": ("min(1, (step + 1) / warmup,", "min(1,"),
    "decline to zero": (", (steps - step) / (steps - warmup))", ")"),
    "clipping": ("CLIP_NORM = 0.005", "CLIP_NORM = 1e9"),
    "weight decay": ("WEIGHT_DECAY = 0.006", "WEIGHT_DECAY = 0.0"),
    "ELU (ReLU)": ("np.exp(z.clip(-80, 0)) - 1), lambda a: a.clip(-1, 0) + 1", "0), np.sign"),
}


def final_losses(source, dataset, data_dir, epochs):
    module = ModuleType("variant")
    module.__file__ = str(SCRIPT)
    exec(compile(source, str(SCRIPT), "exec"), module.__dict__)
    _, images, test_images, _ = module.load_data(dataset, data_dir)
    model = module.Autoencoder(images.mean(axis=0) / 255)
    settings = {"epochs": epochs, "batch_size": 128, "lr": 15.0, "momentum": 0.98, "seed": 0}
    run = module.Run(settings, model, np.zeros_like(model.parameters), [])
    for _ in module.train(run, images, test_images, 1.0):
        pass
    return "{:.5f} / {:.5f}".format(*run.history[-1][:2])


if __name__ == "__main__":
    for name, change in LEFT_OUT.items():
        text = SCRIPT.read_text()
        assert not change or text.count(change[0]) == 1, name
        text = text.replace(*change) if change else text
        with np.errstate(all="ignore"):
            cells = final_losses(text, "mnist", Path(sys.argv[1]), 10)
            cells += " | " + final_losses(text, "sample", Path(), 100)
        print(f"| {name} | {cells} |", flush=True)
