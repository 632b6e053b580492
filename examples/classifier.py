"""Classification is forward KL: the cross-entropy of labels is KL(p‖q) + H(p), of pairs (x, y) and a model q(y|x)."""

from sklearn.datasets import load_digits

import whichkl as wk

images, digits = load_digits(return_X_y=True)
target = wk.Target(samples=(images, digits))

fit = wk.fit(target, wk.families.Neural("categorical", hidden=(64,)))
print(fit)  # the value is the cross-entropy of a fifth of the rows, which training hasn't seen

law = fit.model(fit.target.context[:5])  # a torch Categorical with five rows
print("digits:", digits[:5].tolist(), "most likely:", law.probs.argmax(-1).tolist())
assert fit.value.value < 0.3
