"""Tests that `make test` leaves to `make test-slow`, each with its reason.

A row names a test, why it is slow, and a pattern of the parameter ids that `make test` keeps all
the same: one or more of each kind. Rows of INTERPRETED count only where kernels are interpreted,
which is some hundred times slower than running them.
"""

from __future__ import annotations

import re

__all__ = ["reason_of"]

NONE = "(?!)"

SLOW = {
    "test_torch_compile_takes_part": ("Inductor compiles C++ for every op", NONE),
    "test_a_compiled_side_compiles_in_its_first_step_alone_case_103": ("three compiled runs", NONE),
    "test_every_output_compiles_into_one_graph": ("two compiled losses", "frozen"),
    "test_layers_alone_keep_attention_from_a_mask": ("two compiled models", NONE),
    "test_compiled_run_equals_the_other": ("two trainings a case", NONE),
    "test_remedies_that_fit_come_first": ("forty estimates of one model", NONE),
    "test_so_it_does_with_options": (
        "38 models, estimated and run",
        "auto-mistral-lora-new-token$|auto-qwen3-moe-lora$",
    ),
    "test_case_93_stopped_and_resumed": ("three trainings a case", "packed-stream"),
    "test_case_93_resume_is_exact_with_every_optimizer": ("three trainings a case", "muon-master"),
    "test_a_template_of_preferences_trains_on_the_sample": ("a training a case", "^(dpo|simpo)$"),
    "test_loss_falls": ("thirty steps an optimizer", NONE),
    "test_run_keeps_its_tokens": ("three trainings and what follows a case", "^lora-qwen3$"),
    "test_the_commands_of_a_data_tutorial": ("trainings and previews a page", "moving"),
    "test_case_93_resume_of_an_adapter_is_exact": ("three trainings", NONE),
    "test_case_93_packed_run_resumes_exactly": ("three trainings", NONE),
    "test_case_222_finished_run_is_lengthened": ("three trainings a case", "^max_steps$"),
    "test_case_271_two_processes_train_the_weights_of_one": (
        "three processes; tests of layouts in parallel/ start ranks",
        NONE,
    ),
    "test_two_processes_train_by_the_weights_of_rows_what_one_does": ("three processes", NONE),
    "test_runs_by_a_kernel_have_the_steps_of_runs_by_a_mask": (
        "two trainings a case",
        "^accumulation$",
    ),
    "test_resume_of_another_run_is_refused": ("a training a case", "[0-3]|seed|model"),
    "test_a_signal_ends_the_run_in_progress_too": ("a bench of two processes a case", NONE),
    "test_the_peer_patches_our_model_in_our_loop": ("a bench of four processes", NONE),
    "test_a_preference_is_learned_offline": ("a training a case", "^dpo-sigmoid$"),
    "test_a_killed_run_ends_with_the_same_weights": ("three processes a case", "^precompute-4$"),
    "test_a_step_is_the_same_in_any_split": (
        "six objectives in six splits",
        "^(all-(4x2|packed)|dpo-(8x1|free)|(weighted|simpo|orpo|cpo)-uneven|orpo-packed)$",
    ),
    "test_two_processes_train_the_weights_of_one": ("two processes train beside one", NONE),
    "test_a_run_from_a_trained_model_starts_at_its_reference": ("two trainings", NONE),
    "test_every_objective_has_its_metrics": ("a training a case", "^orpo$"),
    "test_trl": ("a trainer of another library", NONE),
    "test_shards_are_equal_to_one_process": ("two ranks a case", "^lora$"),
    "test_example": ("trainers of other libraries", "^custom_loop$"),
    "test_trainer_case_59_66_67": ("two trainers a case", "^llama-plain$"),
    "test_trainer_asks_for_liger_kernel_case_67": ("a Trainer a case", NONE),
    "test_number_of_processes_changes_nothing": ("three pools of processes", NONE),
    "test_pickle_loads_in_another_process_case_50": ("a process that imports everything", NONE),
    "test_case_89_two_processes_evaluate_as_one": ("three processes", NONE),
    "test_every_side_trains_an_adapter": ("three trainings a case, one compiled", NONE),
    "test_ctrl_c_of_a_launcher_stops_all_after_the_same_step": ("three processes", NONE),
    "test_every_family_trains_as_stock_peft": (
        "every family, in bf16 four adapters of it",
        "^(llama|qwen3_moe)-fp32$|^phi3-bf16$",
    ),
    "test_compiled_layers_train_as_stock_peft": ("compiles the layers of a model", NONE),
    "test_settings_train_as_stock_peft": (
        "eight adapters in four contexts",
        "^(ranks|dropout)-(plain|autocast|checkpoint)$",
    ),
    "test_trainer_with_lora": ("a trainer of another library", NONE),
    "test_sft_with_a_peft_config": ("a trainer of another library", NONE),
    "test_patched_adapter_equals_unpatched": ("a training; others have its keys", NONE),
    "test_plain_transformers_computes_what_the_adapter_did": (
        "a training and a merge a case",
        "^lora$",
    ),
    "test_shipped_configuration_runs": ("a training a file", "sft|lora"),
    "test_master_weights_train_a_model": ("several trainings", NONE),
    "test_interrupt_in_a_terminal": ("a program in a terminal of the test", NONE),
    "test_interrupt_ends_with_130_and_no_traceback": ("a program that generates for long", NONE),
    "test_case_88_89_two_processes_equal_one": ("three processes; case 271 has two", NONE),
    "test_optimizers_have_their_own_state": ("an estimate an optimizer", NONE),
    "test_command_fits_batch_and_sequence": ("a search over estimates", NONE),
    "test_fully_sharded_devices_share_and_gather": ("two estimates of a real shape", NONE),
    "test_remedies_leave_out_what_is_done_already": ("estimates of several remedies", NONE),
    "test_forward_keeps_what_real_tensors_keep": (
        "a model a case",
        "^gemma2-auto$|^qwen3-moe-auto$",
    ),
    "test_auto_fit_keeps_the_steps": ("two trainings a case", "halved"),
    "test_auto_fit_reads_a_stream_once": ("two trainings", NONE),
    "test_auto_fit_ends_at_one_row": ("a training", NONE),
    "test_peer_that_overwrites_its_inputs_says_so": ("a process of a peer", NONE),
    "test_missing_peer_gives_a_row_that_says_so": ("a process of a peer", NONE),
    "test_peer_needs_only_torch_and_what_is_its_own": ("a process of a peer", NONE),
    "test_wrong_op_gets_no_figures": ("a bench a case", NONE),
    "test_a_stopped_run_keeps_the_rows_it_has": ("a bench a case", NONE),
    "test_case_95_balance_of_experts_is_a_mean_too": ("two trainings a case", "mixtral"),
    "test_schedules_that_follow_the_evaluations": ("two trainings a case", NONE),
    "test_bf16_is_rounded_once": ("a training and a merge", NONE),
    "test_case_93_with_evaluations_and_trackers": ("three trainings", NONE),
    "test_case_93_rows_of_64_samples": ("three trainings", NONE),
    "test_resume_keeps_the_sets_of_the_past": ("three trainings", NONE),
    "test_seed_decides_and_data_seed_moves_only_the_data": ("four trainings", NONE),
    "test_compiled_run_is_that_which_was_asked_for_and_resumes": ("three compiled trainings", NONE),
    "test_measuring_leaves_no_trace": ("two trainings a case", NONE),
    "test_layers_that_gain_nothing_run_as_before": ("a compiled training a case", NONE),
    "test_processes_agree": ("three processes a case", NONE),
    "test_compiled_run_resumes_and_is_evaluated": ("three compiled trainings", NONE),
    "test_broken_pipe_ends_quietly": ("a program that generates for long", NONE),
    "test_case_235_a_cut_row_has_the_ids_of_the_whole_one": (
        "hundreds of cuts a case",
        "byte-bpe-2|unigram-900",
    ),
    "test_a_repeated_op_never_enters_triton": (
        "hundreds of launches a case",
        "rms_norm-few|rope-few|^swiglu-many",
    ),
    "test_damaged_checkpoint_gives_way_to_the_one_before": ("two trainings a case", "^cut"),
    "test_each_option_case_42": ("a model an option", "llama|qwen3_moe"),
    "test_case_238_a_tokenizer_that_explodes_names_the_row": ("two processes a case", "^1$"),
    "test_gradient_checkpointing_recomputes_every_layer": ("two trainings a case", NONE),
    "test_a_model_keeps_less_and_computes_the_same_bits": ("two models a case", "llama|gemma2"),
    "test_case_93_streamed_run_resumes_exactly": ("three trainings", NONE),
    "test_compile_in_pieces": ("a compiled model", NONE),
    "test_case_221_packed_adapter_equals_unpatched": ("a training; others have its keys", NONE),
    "test_adapter_run_and_merged_model_say_the_same": ("a training and a merge", NONE),
    "test_data_that_have_changed_are_refused": ("a training a case", "edited|stream"),
    "test_class_mode_case_49": ("a model a family", "llama$|mllama|mixtral"),
    "test_norm_with_fp32_weight_case_16_41": (
        "a model a family",
        "^llama$|gemma3$|olmo2|glm4|llama4",
    ),
    "test_checkpoint_that_cannot_be_written": ("two trainings a case", "full"),
    "test_case_30_a_tracer_sees_the_kernels_and_no_number_of_rows": (
        "Inductor compiles kernels",
        NONE,
    ),
    "test_reasons_not_to_compile": ("a training a case", NONE),
    "test_case_93_killed_at_random_moments": (
        "a run and a start after each kill; kill_runs.py does the same",
        NONE,
    ),
    "test_each_type_of_key_with_every_kind_of_value": (
        "a key a case",
        "dtype|message|output|max_steps|train_on",
    ),
    "test_run_resumes_exactly_and_evaluates_without_noise": ("three trainings", NONE),
    "test_case_93_stream_resumes_at_any_window": ("three readings of a stream a case", "two-bfd"),
    "test_commands_print_what_the_page_shows": (
        "the commands of a page a case",
        "own-template|new-tokens",
    ),
    "test_case_93_on_the_same_ranks_a_resume_is_exact": ("the killed run shows it too", NONE),
    "test_kill_in_a_save_keeps_the_checkpoints_before": ("four ranks a case", "^1$"),
    "test_adapter_of_a_sharded_run_is_that_of_one_process": ("four trainings and a merge", NONE),
    "test_which_checkpoints_have_whole_files": ("two ranks a case", NONE),
    "test_other_ranks_read_what_two_have_written": ("ranks that read and write shards", NONE),
    "test_when_it_evaluates": ("a training a case", "words0"),
    "test_step_case_17_42_57_71_73_83": (
        "a step of two models for each op of each family",
        "^(llama|qwen3_moe)-|-all$",
    ),
    "test_mode_case_59_62_63": ("eleven calls of each family", "-train-items$|^mixtral-"),
    "test_gradient_checkpointing_case_91": (
        "a model a family; four have every kind of module",
        "^(llama|gemma2|qwen3_moe|mllama)-",
    ),
    "test_copies_case_50": (
        "a model a family; four have every kind of module",
        "^(llama|gemma2|qwen3_moe|mllama)$",
    ),
    "test_save_and_load": (
        "a model a family; four have every kind of module",
        "^(llama|gemma2|qwen3_moe|mllama)$",
    ),
    "test_generate_case_62": (
        "a model a family and a way to generate",
        "^(llama|gemma2|qwen3_moe|mllama)|^qwen3-cache|^gemma2-static",
    ),
    "test_autocast": (
        "a model a family; four have every kind of module",
        "^(llama|gemma2|qwen3_moe|mllama)$",
    ),
    "test_bf16_is_no_worse_than_eager_case_16": (
        "a model a family; four have every kind of module",
        "^(llama|gemma2|qwen3_moe|mllama)$",
    ),
    "test_nothing_but_behaviour_changes_case_48_50_51": (
        "a model a family; four have every kind of module",
        "^(llama|gemma2|qwen3_moe|mllama)$",
    ),
    "test_case_211_every_class_of_a_family_is_patched_and_counted_once": (
        "a model a family; four have every kind of module",
        "^(llama|gemma2|qwen3_moe|mllama)$",
    ),
    "test_plan_on_meta_equals_plan_with_weights": (
        "a model a family; four have every kind of module",
        "^(llama|gemma2|qwen3_moe|mllama)$",
    ),
    "test_cross_entropy_is_called_case_57": (
        "a model a family; four have every kind of module",
        "^(llama|gemma2|qwen3_moe|mllama)$",
    ),
    "test_shifted_labels_alone_case_63": (
        "a model a family; four have every kind of module",
        "^(llama|gemma2|qwen3_moe|mllama)$",
    ),
    "test_token_accuracy_case_81": (
        "a model a family; four have every kind of module",
        "^(llama|gemma2|qwen3_moe|mllama)$",
    ),
    "test_a_right_op_is_never_left_out": (
        "a trial of each op of each family",
        "^(llama|gemma2|qwen3_moe|mllama)-",
    ),
    "test_case_107_start_up_counts_the_modules_of_each_op": (
        "a start a family",
        "^(gemma2|qwen3-moe|mllama|phi3)$",
    ),
    "test_adapter_case_54_55": (
        "an adapter of each kind on four families",
        "^llama-|-lora-patch-first",
    ),
    "test_call_case_61": ("fourteen calls of four models", "^llama-"),
    "test_case_93_two_processes": ("six runs of two processes", NONE),
    "test_case_241_whole_process": ("a program that is stopped at ten moments", NONE),
    "test_case_209_class_mode_reaches_the_reference_of_a_trainer": (
        "a trainer of another library a case",
        NONE,
    ),
    "test_ops_import_without_transformers_case_75": (
        "a process that imports everything; test_architecture has others",
        NONE,
    ),
    "test_installing_is_undone": ("a process that imports everything", NONE),
    "test_training_is_the_same_with_and_without_evaluations": ("four trainings", NONE),
    "test_peer_that_ends_gives_rows_that_say_so": ("a process of a peer", NONE),
    "test_precisions_train": ("a training a case", "^--bf16$"),
    "test_case_59_95_accumulation_equals_one_batch": ("two trainings a case", "^all$"),
    "test_case_95_last_window_of_an_epoch": ("a training; others have its keys", NONE),
    "test_case_oom_is_explained": ("a training a case", "^torch$"),
    "test_a_stopped_run_continues_by_its_path_alone": ("three trainings a case", "^run$"),
    "test_checkpoint_is_an_adapter_that_peft_loads": ("a training a case", "^lora$"),
    "test_equals_the_logits_of_the_stock_model": ("an evaluation a case", "^(3-none|8-ce)$"),
    "test_estimate_of_dora_on_a_model_in_few_bits": ("three estimates a case", "4bit-auto"),
    "test_lora_keeps_less_too": ("two models a case", "all-0"),
    "test_loss_is_the_language_models_alone": ("a training a case", "auto"),
    "test_nothing_half_written_is_left": ("a training and a merge", NONE),
    "test_case_236_a_template_without_end_is_stopped": (
        "a template that runs into its limit a case",
        "^render_chat-",
    ),
    "test_case_222_rates_after_a_resume": (
        "two schedules a case",
        "^(linear|cosine|warmup_stable_decay|constant)-",
    ),
    "test_case_269_held_out_rows_are_never_trained_on": ("a reading of the data a case", "^0.2-"),
    "test_packed_layers_train_as_stock_peft": (
        "two steps of packed layers a case",
        "^(lora-0.2-nf4|dora-0.2-nf4-bf16|lora-0.0-fp4-bf16)",
    ),
    "test_case_214_export": ("a traced model a case", NONE),
    "test_profile_holds_the_steps_asked_for": ("a profiled training a case", "^2-3-2$"),
    "test_case_101_loss_and_gradients_are_those_of_padded_rows": (
        "two models a case",
        "^(gemma3-text|mixtral|qwen3)-",
    ),
    "test_case_101_no_document_has_a_gradient_in_another": (
        "a model a case",
        "^(llama|gemma2|gemma3_text|gpt_oss|llama4_text)-",
    ),
    "test_case_213_an_interrupted_undo_is_finished_by_another": (
        "hundreds of interruptions a case",
        "^record$",
    ),
    "test_case_212_a_tool_wrapped_a_function": ("two models a case", "-True$"),
    "test_old_checkpoints_resume_as_they_were_trained": ("three trainings", NONE),
    "test_case_266_logs_are_on_the_disk_before_the_checkpoint": ("two trainings", NONE),
    "test_report_of_a_shorter_run_is_not_that_of_a_longer_one": ("three trainings", NONE),
    "test_run_goes_on_in_another_directory_with_its_past": ("three trainings", NONE),
    "test_flags_win_and_are_checked": ("three trainings", NONE),
    "test_max_steps_alone_lengthens_it": ("two trainings; case 222 lengthens too", NONE),
    "test_checkpoint_from_before_the_key_resumes_padded": ("two trainings", NONE),
    "test_run_of_an_odd_number_of_rows_is_resumed": ("three trainings", NONE),
    "test_resume_of_a_fitted_run_has_the_same_data": ("two trainings", NONE),
    "test_auto_fit_in_the_middle_of_a_run_and_of_a_window": ("two trainings", NONE),
    "test_adapter_of_an_adapter_is_refused": ("a training first", NONE),
    "test_change_that_bf16_cannot_hold_is_said": ("a training and a merge", NONE),
    "test_merged_model_is_a_model_for_every_command": (
        "a training, a merge and five commands",
        NONE,
    ),
    "test_file_that_has_changed_since_the_checkpoint_is_refused": ("two trainings", NONE),
    "test_rows_of_many_lengths_are_compiled_twice": ("a compiled training", NONE),
    "test_layers_are_compiled_twice_for_all_lengths": ("a compiled model", NONE),
    "test_accumulation_that_agrees_trains_the_same": ("two trainings", NONE),
    "test_checkpoints_of_a_later_step_are_left_alone": ("two trainings", NONE),
    "test_best_is_saved_though_no_checkpoint_is_due": ("a training of many evaluations", NONE),
    "test_head_and_embedding_stay_tied": ("a training and a merge", NONE),
    "test_case_231_one_of_many_takes_a_stale_lock": ("many processes", NONE),
    "test_a_resumed_run_does_not_start_again": ("two trainings", NONE),
    "test_case_228_an_adapter_that_is_trained_on_is_counted_and_changes": ("three trainings", NONE),
    "test_two_launchers_are_one_launch": ("runs of two ranks", NONE),
    "test_a_signal_stops_all_after_the_same_step": ("three processes with torch a case", NONE),
    "test_sigterm_of_one_rank_stops_all": ("three processes with torch", NONE),
    "test_a_killed_rank_ends_all_and_the_run_continues": ("six processes with torch", NONE),
    "test_a_host_whose_launcher_is_killed_ends_the_other": ("two processes with torch", NONE),
    "test_srun_starts_what_torchrun_does": ("two processes with torch", NONE),
    "test_two_launchers_train_one_run": ("four processes with torch a case", NONE),
    "test_a_rank_that_hangs_is_named": ("three processes with torch", NONE),
    "test_an_error_of_rank_0_alone_is_said_once": ("three processes with torch", NONE),
    "test_an_error_under_torchrun_is_said_once": ("three processes with torch", NONE),
    "test_dtype_of_whole_files": ("ranks that read and write shards", NONE),
    "test_two_ranks_read_what_one_process_has_saved": ("ranks that read and write shards", NONE),
    "test_whole_files_are_those_of_save_pretrained": (
        "a model of each optimizer in two ranks",
        "adamw",
    ),
    "test_one_process_reads_what_two_have_written": (
        "a model of each optimizer in two ranks",
        "adamw|moe|lora",
    ),
    "test_full_disk_of_one_rank_is_the_same_error_on_all": ("runs of two ranks", NONE),
    "test_resume_with_other_rows_names_the_keys_that_keep_them": ("runs of two ranks", NONE),
    "test_harmed_shard_is_named": ("a run of two ranks a case", "^gone$"),
    "test_case_217_sharded_training_is_that_of_one_process": (
        "two ranks in many layouts; tests of parallel/ have those of liger train",
        NONE,
    ),
    "test_first_fault_is_the_end": (
        "ranks that hang until they are ended",
        "^(raises|killed|crashed|two-faults|all-raise|configuration|hangs)$",
    ),
    "test_a_signal_of_the_launcher_stops_the_ranks": ("ranks that are stopped a case", "15$"),
    "test_a_run_starts_at_its_reference_and_resumes_exactly": (
        "three trainings a case",
        "^(adapter_off|precompute)$",
    ),
    "test_precomputed_values_are_found_again": ("two trainings", NONE),
    "test_another_model_is_a_reference": ("two trainings", NONE),
    "test_eval_compares_an_adapter_with_the_model_below_it": ("two trainings", NONE),
    "test_case_267_gradient_is_clipped": ("two trainings", NONE),
    "test_eager_against_patched": ("two trainings", NONE),
    "test_case_93_resume_is_exact": ("two trainings", NONE),
    "test_case_271_the_loss_scale_is_saved_and_restored": ("two trainings", NONE),
    "test_a_file_of_keys_stands_in_place_of_the_runs": ("two trainings", NONE),
    "test_true_works_on_a_cpu_by_the_mask": ("two trainings", NONE),
    "test_limit_deletes_the_damaged_first": ("two trainings", NONE),
    "test_early_end_is_saved_and_not_resumed": ("two trainings", NONE),
    "test_resume_after_a_kill_before_the_last_evaluation": ("two trainings", NONE),
    "test_ranks_and_exclusions_are_trained_resumed_and_merged": ("three trainings", NONE),
    "test_image_text_model_keeps_its_processor": ("a training and a merge", NONE),
    "test_run_is_its_best_checkpoint_else_its_last_whole_one": ("a training and a merge", NONE),
    "test_base_with_random_weights_is_found_in_the_run": ("a training and a merge", NONE),
    "test_output_may_be_the_current_directory": ("a training and a merge", NONE),
    "test_adapter_of_another_model_is_refused": ("a training and a merge", NONE),
    "test_small_configuration_runs_as_it_is": ("a training; others have its keys", NONE),
    "test_default_directory_is_named_after_the_model": ("a training; others have its keys", NONE),
    "test_shipped_lora_configuration_trains_with_the_op": (
        "a training; others have its keys",
        NONE,
    ),
    "test_no_cache_of_keys_is_kept_beneath_an_adapter": ("a training; others have its keys", NONE),
    "test_directory_with_the_configuration_of_its_base_is_an_adapter": (
        "a training; others have its keys",
        NONE,
    ),
    "test_no_memory_for_a_shape_is_a_row_without_figures": ("a bench a case", NONE),
    "test_a_run_stopped_before_the_first_row_has_no_report": ("a bench a case", NONE),
    "test_wrong_op_is_found_where_the_truth_is_fp32": ("a bench a case", NONE),
    "test_attention_by_implementation_and_mask": ("several estimates", NONE),
    "test_measured_steps_of_a_bench": ("several estimates", NONE),
    "test_master_weights_and_autocast": ("several estimates", NONE),
    "test_adapter_has_moments_for_what_is_trained_only": ("several estimates", NONE),
    "test_float32_shares_no_keys_and_so_makes_scores": ("several estimates", NONE),
    "test_estimate_knows_what_the_layers_keep": ("several estimates", NONE),
    "test_case_214_jit_trace": ("a traced model a case", "llama-True"),
    "test_verify_compares_the_gradients_of_an_adapter": ("two models a case", "float32"),
    "test_rows_of_new_tokens_are_trained_wherever_the_weights_lie": (
        "two trainings a case",
        "qwen3",
    ),
    "test_case_239_any_value_anywhere_in_a_report_is_shown_or_refused": (
        "a report for each of its values",
        "old_bench",
    ),
    "test_case_223_fields_of_rows": ("a reading a field and a format", "-(text|messages)$"),
    "test_case_224_text_and_trained_tokens_of_shipped_templates": (
        "a template and a conversation a case",
        "-(several|tools|thoughts_field)$",
    ),
    "test_damaged_files": ("a run a case", "[0-2]"),
    "test_layers_of_a_family_are_compiled_once": ("a compiled training", NONE),
    "test_compile": ("a compiled model a case", "^llama$"),
    "test_compile_makes_logits_for_other_losses": ("a compiled model", NONE),
    "test_an_adapter_is_compared_in_training": ("two models in fp64", NONE),
    "test_an_adapter_trained_on_is_its_own_reference": ("two trainings", NONE),
    "test_head_stays_tied_unless_the_adapter_is_of_one_of_the_two": ("three merges", NONE),
    "test_trainer": ("two trainers a case", NONE),
    "test_a_second_signal_ends_what_does_not_stop": ("ranks that hang until they are ended", NONE),
    "test_a_pair_is_two_sequences": ("several estimates", NONE),
    "test_run_after_an_option_that_needs_no_file": ("a training a case", NONE),
    "test_trackers_get_every_set": ("a training of several sets", NONE),
    "test_checkpoints_are_kept_to_the_limit": ("a training of many checkpoints", NONE),
}

INTERPRETED = {
    "test_op_is_no_worse_than_eager": (
        "every case in float32; in the others the kernels of a GPU have all cases",
        "^(?!moe).*-float32$|^(?!moe).*-(odd|rank-3)-|"
        "^moe_experts-(tiny|gpt-oss|llama4|empty-slots)-float32|^moe_experts-(tiny|gpt-oss)-b",
    ),
    "test_case_201_tensors_of_any_layout": (
        "two interpreted calls a case",
        "-(x|q|residual|logits|hidden|weight)-strided",
    ),
    "test_case_201_incoming_gradients_of_any_layout": (
        "two interpreted calls a case",
        "^(?!moe).*column",
    ),
    "test_op_is_bitwise_reproducible": (
        "the largest shape twice",
        "rms_norm|layer_norm|glu|logprobs",
    ),
    "test_case_204_values_in_range_give_the_reference": ("a call a value", "^(?!moe)"),
    "test_a_number_of_any_type_is_the_number_it_holds": ("a call a type", "^(?!moe)"),
    "test_every_case_again_in_chunks_of_three_tokens": (
        "every case of an op, and test_op_is_no_worse_than_eager has them in its own chunks",
        "logprobs",
    ),
    "test_case_203_finite_logits_of_any_size": (
        "an interpreted loss a case",
        "-(plain|softcap)-none$",
    ),
    "test_case_10_gradients_exist_exactly_where_asked_for": (
        "an interpreted loss a case",
        "^mean",
    ),
    "test_case_91_inside_a_checkpoint_under_autocast": ("two interpreted losses a case", "mean"),
    "test_label_count_is_an_upper_bound": ("several interpreted losses a case", "mean|sum"),
    "test_case_204_wrong_values_are_refused_by_name": ("no kernel runs", NONE),
    "test_case_205_a_wrong_device_is_refused_by_name": ("no kernel runs", NONE),
    "test_case_206_dtypes_that_are_not_listed_are_refused": ("no kernel runs", NONE),
}


def reason_of(name: str, *, interpreted: bool) -> str | None:
    """Return why a test is not a part of `make test`, or None if it is.

    Args:
        name: The test's name with its parameters, as pytest writes it.
        interpreted: Whether kernels are interpreted.
    """
    function, _, parameters = name.partition("[")
    tables = (SLOW, INTERPRETED) if interpreted else (SLOW,)
    for table in tables:
        if function in table:
            reason, kept = table[function]
            return None if re.search(kept, parameters.rstrip("]")) else reason
    return None
