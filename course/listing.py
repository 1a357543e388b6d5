"""The exercises, in the order of the lectures: functions that are emptied, tests that grade them."""

from dataclasses import dataclass, field


@dataclass
class Exercise:
    """Functions to write, and the claims that they must fulfil."""

    number: int
    lecture: int
    title: str  # of the paper: "eq. 8"
    functions: list  # their names in the one module: ["q_sample"], ["MaxPooling.forward", …]
    module: str  # "ddpm"
    tests: list  # names in tests/test_<module>.py; they take no fixtures
    hints: dict = field(default_factory=dict)  # test -> what to look at if it fails
    given: dict = field(default_factory=dict)  # function -> start of the last statement that stays

    @property
    def file(self):
        return f"{self.module}.py"


EXERCISES = [
    # ------------------------------------------------ 1: noise and denoising
    Exercise(
        1, 1, "eq. 8", ["q_sample"], "ddpm",
        ["test_eq8_marginal_equals_iterated_eq6",
         "test_predict_x0_inverts_eq8",
         "test_eq9_marginal_is_gaussian_with_mean_sqrt_alpha_bar_x0_and_variance_1_minus_alpha_bar"],
        {"test_eq8_marginal_equals_iterated_eq6":
            "both factors are square roots, of ᾱ and not of α",
         "test_predict_x0_inverts_eq8": "is the noise added, with a plus?"},
    ),
    Exercise(
        2, 1, "eq. 10", ["p_step"], "ddpm",
        ["test_eq10_mean_is_the_bayes_posterior",
         "test_eq10_noise_has_variance_beta_and_is_absent_at_t_0"],
        {"test_eq10_mean_is_the_bayes_posterior":
            "where is the square root: over α_t outside, over 1−ᾱ_t inside; the rest has none",
         "test_eq10_noise_has_variance_beta_and_is_absent_at_t_0":
            "√β_t times the noise, and none in the rows where t = 0"},
    ),
    Exercise(
        3, 1, "DDIM", ["sample_ddim"], "ddpm",
        ["test_ddim_is_its_formula_stride_by_stride",
         "test_ddim_of_a_model_that_knows_x0_ends_one_step_noisy"],
        {"test_ddim_is_its_formula_stride_by_stride":
            "strides go from the last time step down; the model is told t, the noise is that of s",
         "test_ddim_of_a_model_that_knows_x0_ends_one_step_noisy":
            "the last stride ends at s = 0, at ᾱ₀ and not at 1"},
    ),
    # ------------------------------------------------ 2: guidance and latents
    Exercise(
        4, 2, "eq. 11", ["guide"], "ddpm",
        ["test_eq11_guidance_extrapolates_from_the_unconditional_prediction"],
        {"test_eq11_guidance_extrapolates_from_the_unconditional_prediction":
            "at w = 1 only the conditional prediction may be left"},
    ),
    # ------------------------------------------------ 3: attention and IP-Adapter
    Exercise(
        5, 3, "attention", ["attention"], "attention",
        ["test_attention_is_the_weighted_mean_of_v_by_softmax_of_qk_over_sqrt_d",
         "test_fused_kernel_equals_written_out_formula"],
        {"test_attention_is_the_weighted_mean_of_v_by_softmax_of_qk_over_sqrt_d":
            "divide by √d before the softmax, which runs over the tokens that are read (S)"},
    ),
    Exercise(
        6, 3, "eq. 3", ["CrossAttention.forward"], "attention",
        ["test_without_text_it_is_self_attention",
         "test_eq3_at_lam_zero_or_without_image_tokens_or_adapter_is_exactly_text_only",
         "test_eq3_adds_lambda_times_attention_to_image_tokens_before_the_output_projection"],
        {"test_without_text_it_is_self_attention": "c_t = None means that x reads itself",
         "test_eq3_at_lam_zero_or_without_image_tokens_or_adapter_is_exactly_text_only":
            "there are image tokens only if c_i is given and image_kv attached",
         "test_eq3_adds_lambda_times_attention_to_image_tokens_before_the_output_projection":
            "two softmaxes, the same Q, and the sum is taken before to_out"},
    ),
    # ------------------------------------------------ 4: several references
    Exercise(
        7, 4, "section 3.4", ["MaxPooling.forward", "AveragePooling.forward"], "aggregators",
        ["test_closed_forms_of_none_max_avg_concat",
         "test_shapes_and_single_reference_of_every_aggregator",
         "test_pooling_ignores_the_order_of_references"],
        {"test_closed_forms_of_none_max_avg_concat":
            "over the references (dim 1), which stays as a dimension of length 1"},
    ),
    Exercise(
        8, 4, "Algorithm 1", ["SelfAttention.forward"], "aggregators",
        ["test_selfattn_starts_as_average",
         "test_alg1_is_what_the_paper_writes"],
        {"test_selfattn_starts_as_average": "with W_k = 0 all weights are 1/N; is something added?",
         "test_alg1_is_what_the_paper_writes": "Q, K, V, softmax(QKᵀ/√d_k)·V, then W_out, no more"},
    ),
    Exercise(
        9, 4, "eq. 1, batches", ["leave_one_out"], "data",
        ["test_eq1_target_is_never_among_its_references",
         "test_eq1_removed_photo_is_uniform_and_references_are_bootstrapped",
         "test_eq1_of_more_than_n_photos_a_random_n_take_part"],
        {"test_eq1_target_is_never_among_its_references":
            "take the target away first, then fit the others to n−1 (choose_references)",
         "test_eq1_removed_photo_is_uniform_and_references_are_bootstrapped":
            "every photo may be the target; nothing repeats until all others are there",
         "test_eq1_of_more_than_n_photos_a_random_n_take_part": "shuffle first, then take n"},
        given={"leave_one_out": "if not groups"},
    ),
    Exercise(
        10, 4, "eq. 1", ["noise_error", "adapter_loss"], "ip_adapter",
        ["test_eq1_model_reads_the_noised_latent_and_is_compared_with_the_noise",
         "test_eq1_is_a_mean_not_a_sum"],
        {"test_eq1_model_reads_the_noised_latent_and_is_compared_with_the_noise":
            "eq. 8 makes z_t; unet(z_t, t, c_t, c_i) should be ε, not z_0; square, no mean yet"},
    ),
    Exercise(
        11, 4, "section 3.3", ["drop_conditions"], "ip_adapter",
        ["test_text_image_and_both_are_dropped_with_probability_p_each"],
        {"test_text_image_and_both_are_dropped_with_probability_p_each":
            "three events that exclude each other, each of probability p; one u a row decides"},
    ),
    # ------------------------------------------------ 5: DreamBooth and LoRA
    Exercise(
        12, 5, "section 3.2, x-loss", ["x0_loss"], "dreambooth",
        ["test_x_form_is_the_papers_formula",
         "test_x_form_with_w_t_equals_eps_form_in_values_and_gradients"],
        {"test_x_form_is_the_papers_formula":
            "√(1−ᾱ_t)/√ᾱ_t multiplies ε − ε̂, the square comes after; w_t is not squared"},
    ),
    Exercise(
        13, 5, "section 3.2", ["prior_preservation_loss"], "dreambooth",
        ["test_prior_preservation_is_a_mean_over_photos_and_lambda_times_one_over_class_pictures",
         "test_prior_preservation_without_class_pictures_is_the_loss_of_the_photos"],
        {"test_prior_preservation_is_a_mean_over_photos_and_lambda_times_one_over_class_pictures":
            "two means, not one over both; the photos read c, the class pictures c_pr",
         "test_prior_preservation_without_class_pictures_is_the_loss_of_the_photos":
            "the mean of nothing is NaN: B' = 0 needs a case of its own"},
    ),
    # ------------------------------------------------ 6: metrics
    Exercise(
        14, 6, "eq. 4", ["textbook_frechet_distance", "frechet_distance", "Gaussian.sigma"],
        "metrics",
        ["test_eq4_in_one_dimension_is_a_distance_of_means_and_standard_deviations",
         "test_eq4_textbook_form_of_commuting_covariances",
         "test_eq4_equal_covariances_leave_the_squared_distance_of_the_means",
         "test_eq4_commuting_covariances_are_distances_of_standard_deviations",
         "test_gaussian_is_the_same_in_any_split_and_far_from_zero"],
        {"test_eq4_in_one_dimension_is_a_distance_of_means_and_standard_deviations":
            "(m_p − m_q)² + (σ_p − σ_q)²: a square, a root, a factor of 2",
         "test_eq4_textbook_form_of_commuting_covariances":
            "the root of a matrix (sqrtm) is not the roots of its numbers",
         "test_gaussian_is_the_same_in_any_split_and_far_from_zero": "n or n − 1?"},
        given={"frechet_distance": "if not all(", "Gaussian.sigma": "if self.n < 2"},
    ),
    Exercise(
        15, 6, "eq. 5", ["inception_score"], "metrics",
        ["test_eq5_uniform_posteriors_give_1_and_balanced_certain_ones_give_K",
         "test_eq5_marginals_differ_for_unbalanced_classes",
         "test_eq5_uniform_marginal_is_K_over_the_exponential_of_the_mean_entropy",
         "test_eq5_every_split_has_its_own_marginal"],
        {"test_eq5_uniform_posteriors_give_1_and_balanced_certain_ones_give_K":
            "0·log 0 is 0 (torch.xlogy); mean over pictures, then exp",
         "test_eq5_marginals_differ_for_unbalanced_classes":
            "p(y) is the mean of p(y|x), or 1/K; and 0/0 is NaN, so take log p − log q",
         "test_eq5_uniform_marginal_is_K_over_the_exponential_of_the_mean_entropy":
            "p is float64: 1/K must be, too",
         "test_eq5_every_split_has_its_own_marginal": "p(y) is the mean over the split's pictures"},
        given={"inception_score": "p = p[np.random"},
    ),
]  # fmt: skip


def find_exercise(number):
    """The exercise of that number. ValueError if there is none."""
    for exercise in EXERCISES:
        if exercise.number == number:
            return exercise
    raise ValueError(f"there is no exercise {number}: they are 1 to {len(EXERCISES)}")
