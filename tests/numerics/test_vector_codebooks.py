import torch

from penjing.numerics.vector_codebooks import nearest_vectors, residual_kmeans, vector_kmeans


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def error(vectors, weights, books, indices):
    total = sum(book[index] for book, index in zip(books, indices, strict=True))
    return float((weights * (vectors - total).square()).sum())


def test_the_nearest_is_that_of_the_slowest_loop():
    torch.manual_seed(0)
    vectors, weights, book = torch.randn(200, 3), torch.rand(200, 3) + 0.1, torch.randn(7, 3)
    slow = torch.stack([(w * (v - book).square()).sum(1) for v, w in zip(vectors, weights, strict=True)]).argmin(1)
    assert torch.equal(nearest_vectors(vectors, weights, book), slow)


def test_clusters_are_found():
    torch.manual_seed(0)
    centers = torch.tensor([[0.0, 0, 9], [9, 0, 0], [0, 9, 0], [9, 9, 9]])
    vectors = (centers[:, None] + 0.1 * torch.randn(4, 50, 3)).reshape(-1, 3)
    book = vector_kmeans(vectors, torch.ones_like(vectors), 4, draw())
    assert torch.cdist(centers, book).min(1).values.max() < 0.1


def test_each_entry_is_the_weighted_mean_of_its_vectors():
    torch.manual_seed(0)
    vectors, weights = torch.randn(3000, 2), torch.rand(3000, 2) + 0.01
    book = vector_kmeans(vectors, weights, 8, draw())
    index = nearest_vectors(vectors, weights, book)
    for k in range(8):
        mean = (weights * vectors)[index == k].sum(0) / weights[index == k].sum(0)
        torch.testing.assert_close(book[k], mean, atol=0.03, rtol=0)


def test_a_second_level_stands_for_what_the_first_leaves_over():
    torch.manual_seed(0)
    vectors, weights = torch.randn(4000, 4), torch.ones(4000, 4)
    errors = {
        levels: error(vectors, weights, *residual_kmeans(vectors, weights, 16, levels, draw())) for levels in (1, 2)
    }
    assert errors[2] < 0.65 * errors[1]
    assert residual_kmeans(vectors, weights, 16, 2, draw())[0].equal(
        residual_kmeans(vectors, weights, 16, 2, draw())[0]
    )
