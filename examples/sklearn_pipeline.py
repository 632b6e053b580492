"""A density estimator among scikit-learn's own: scaled, searched over, sampled."""

import numpy as np
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import whichkl as wk
from whichkl.sklearn import DensityEstimator

petals = wk.problems.petals().samples.numpy()
np.random.default_rng(0).shuffle(petals)
pipeline = make_pipeline(StandardScaler(), DensityEstimator(random_state=0))
choices = {"densityestimator__family": ["gaussian", "mixture:2", "mixture:3", "student_t"]}
search = GridSearchCV(pipeline, choices, cv=5).fit(petals)  # by the mean log likelihood of rows left out

for family, score in zip(choices["densityestimator__family"], search.cv_results_["mean_test_score"], strict=True):
    print(f"{family:10} {score:.3f} nats a row")
print("best:", search.best_params_["densityestimator__family"])

scaler, density = search.best_estimator_
print("draws:", scaler.inverse_transform(density.sample(3, random_state=0)).round(1).tolist())
print("log density of the first petal:", search.score_samples(petals[:1]).round(2))
