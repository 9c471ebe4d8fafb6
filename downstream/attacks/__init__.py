"""Adversarial attacks on classifiers, with random starts as a first-class thing: expectation over them, or one fixed.

AutoAttack's parts are written here: of the packages that carry it, torchattacks pins a version of requests from 2020,
adv-lib needs visdom, which no longer builds, and ART has no expectation over transformations and puts DeepFool in
FAB's place (docs/reasoning.md). Each attack is tested against linear classifiers, whose minimal perturbation is known.
"""
