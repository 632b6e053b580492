"""You have a teacher and a student: any divergence of their logits, of a stored top-k, or of their heads in chunks."""

import torch

import whichkl as wk

generator = torch.Generator().manual_seed(0)
hidden = torch.randn(256, 32, generator=generator)
head_teacher = torch.randn(1000, 32, generator=generator) / 4
head_student = (head_teacher + torch.randn(1000, 32, generator=generator) / 8).requires_grad_()
teacher, student = hidden @ head_teacher.T, hidden @ head_student.T

for name, entry in wk.losses.DIVERGENCES.items():
    print(f"{name:<18} {entry.function(teacher=teacher, student=student).item():.4f} nats   {entry.divergence.formula}")

full = wk.losses.forward_kl(teacher=teacher, student=student)
for k in (5, 50, 500):
    low = wk.losses.forward_kl(teacher=wk.losses.TopK.of(teacher, k), student=student)
    print(f"forward KL from the teacher's top {k}: {low.item():.4f} of {full.item():.4f}")
    assert 0 <= low <= full

optimizer = torch.optim.Adam([head_student], lr=0.02)
for step in range(31):
    loss = wk.losses.linear_divergence(  # the logits of all rows are never held
        hidden_student=hidden,
        weight_student=head_student,
        hidden_teacher=hidden,
        weight_teacher=head_teacher,
        divergence="reverse_kl",
        chunk_size=64,
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}: reverse KL {loss.item():.4f}")
assert loss < 0.2 * full
