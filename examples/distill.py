"""You have a trained classifier: a smaller student, by either direction of KL, scored on images that nothing has seen."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import whichkl as wk

images, digits = load_digits(return_X_y=True)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
x = torch.as_tensor(images / 16, dtype=torch.float32)[order]
y = torch.as_tensor(digits)[order]
seen, unseen = (x[:1200], y[:1200]), (x[1200:], y[1200:])

torch.manual_seed(0)
teacher = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
for _ in range(100):
    optimizer.zero_grad()
    nn.functional.cross_entropy(teacher(seen[0]), seen[1]).backward()
    optimizer.step()


def student():
    return nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10))


for objective in ("forward_kl", "reverse_kl"):
    result = wk.distill(
        teacher=teacher,
        student=student,
        data=seen,
        held_out=unseen,
        objective=objective,
        hard_label_weight=0.1,
        temperature=2.0,
        learning_rate=0.02,
        epochs=20,
    )
    print(result, "\n")
    assert result.scores.agreement.value > 0.5

wk.report(result, "distillation.html")
