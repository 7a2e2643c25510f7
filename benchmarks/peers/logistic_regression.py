"""scikit-learn's logistic regression, as it comes, on standardised features of the frozen network."""

from common import Images, outputs, pretrained, read_job, standard_evaluation
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn


def main() -> None:
    job = read_job(__doc__)
    network = pretrained(job)
    network.fc = nn.Identity()
    train, test = (Images(images, job.classes, standard_evaluation(job.size)) for images in (job.train, job.test))
    # Its default of 100 iterations may end before it has converged.
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))
    classifier.fit(outputs(network, train).numpy(), train.targets)
    job.write(classifier.predict_proba(outputs(network, test).numpy()))


if __name__ == "__main__":
    main()
