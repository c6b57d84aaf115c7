//! The index of all integration tests. What a machine lacks is reported as ignored, never as passed.

mod adapters;
mod architecture;
mod asking;
mod boundary;
mod browser;
mod browser_bundle;
mod browser_check;
mod bundles;
mod churn;
mod devices;
mod experiments;
mod faults;
mod federation;
mod fetching;
mod gradients;
mod kill;
mod learning;
mod ledger;
mod life;
mod limits;
mod modalities;
mod page;
mod parity;
mod rounds;
mod training;

use fednano_tests::Needs::{self, Chromium, EasyVqa, NanoLlava, Nothing, Vulkan};
use libtest_mimic::{Arguments, Failed, Trial};

type Test = fn() -> anyhow::Result<()>;

/// Name, what it needs, the test.
const INDEX: &[(&str, &[Needs], Test)] = &[
    // The checkpoints of PyTorch and transformers, from picture files to Fisher values and decoded tokens.
    ("parity::tiny_llava_equals_the_reference", &[Nothing], parity::tiny_on_flex),
    ("parity::tiny_llava_equals_the_reference_on_wgpu", &[Vulkan], parity::tiny_on_wgpu),
    ("parity::every_variant_equals_the_reference", &[Nothing], parity::variants_on_flex),
    ("parity::every_variant_equals_the_reference_on_wgpu", &[Vulkan], parity::variants_on_wgpu),
    ("parity::a_check_without_reference_runs_and_says_so", &[Nothing], parity::without_reference),
    // Planted mistakes must not pass.
    ("parity::an_untransposed_square_matrix_fails", &[Nothing], parity::untransposed_matrix),
    ("parity::tiled_key_value_heads_fail", &[Nothing], parity::tiled_heads),
    ("parity::a_tanh_gelu_in_the_projector_fails", &[Nothing], parity::tanh_gelu_in_the_projector),
    ("parity::a_wrong_rms_epsilon_fails", &[Nothing], parity::wrong_rms_epsilon),
    ("parity::a_wrong_layer_norm_epsilon_fails", &[Nothing], parity::wrong_layer_norm_epsilon),
    ("parity::a_kept_class_token_fails", &[Nothing], parity::class_token_kept),
    // The client's half of the same checkpoints, in headless Chromium.
    ("browser::wasm_flex_equals_the_reference", &[Chromium], browser_check::wasm_flex),
    ("browser::webgpu_equals_the_reference", &[Chromium], browser_check::webgpu),
    ("browser::a_planted_mistake_fails_in_the_tab", &[Chromium], browser_check::planted_mistakes),
    // Files of a checkpoint.
    ("parity::shards_load_and_a_missing_one_is_named", &[Nothing], parity::shards),
    ("parity::unexpected_tensors_are_named", &[Nothing], parity::unexpected_tensors),
    ("parity::unknown_architectures_are_named", &[Nothing], parity::unknown_architecture),
    // The decoder in f16 and bf16.
    ("parity::f16_and_bf16_are_near_f32_and_not_f32", &[Nothing], parity::half_types),
    ("parity::a_type_that_the_device_lacks_is_refused", &[Vulkan], parity::lacking_type),
    // Models from the hub, which a local server imitates.
    ("fetching::the_needed_files_whole_and_in_the_cache", &[Nothing], fetching::whole),
    ("fetching::a_second_time_downloads_nothing", &[Nothing], fetching::second_time),
    ("fetching::an_interrupted_download_goes_on_by_range", &[Nothing], fetching::resume),
    ("fetching::a_damaged_file_is_refused_and_removed", &[Nothing], fetching::damaged),
    ("fetching::no_network_is_said_clearly", &[Nothing], fetching::no_network),
    ("fetching::unknown_and_gated_models", &[Nothing], fetching::unknown_or_closed),
    // The client's half as pieces.
    ("bundles::pieces_give_the_same_features", &[Nothing], bundles::same_features),
    ("bundles::a_bundle_is_prepared_once", &[Nothing], bundles::prepared_once),
    ("bundles::a_client_fetches_only_what_it_lacks", &[NanoLlava], bundles::fetched_once),
    ("bundles::ranges_tags_and_compression", &[NanoLlava], bundles::ranges_and_tags),
    ("bundles::damaged_and_cut_pieces_are_mended_or_reported", &[Nothing], bundles::damaged_and_cut),
    ("bundles::hostile_manifests_are_refused", &[Nothing], bundles::hostile_manifests),
    ("browser_bundle::a_second_visit_downloads_nothing", &[NanoLlava, Chromium], browser_bundle::second_visit),
    ("browser_bundle::an_interrupted_download_goes_on", &[Chromium], browser_bundle::interrupted_large),
    ("browser_bundle::a_damaged_piece_alone_is_fetched_again", &[NanoLlava, Chromium], browser_bundle::damaged_piece),
    ("browser_bundle::too_little_room_is_said_first", &[NanoLlava, Chromium], browser_bundle::too_little_room),
    ("browser_bundle::two_tabs_share_one_download", &[NanoLlava, Chromium], browser_bundle::two_tabs_share),
    // The split changes nothing.
    ("gradients::split_equals_whole", &[NanoLlava], gradients::split_equals_whole),
    ("gradients::the_closed_form_equals_autodiff", &[NanoLlava], gradients::closed_form),
    ("gradients::finite_differences", &[NanoLlava], gradients::finite_differences),
    ("gradients::merged_requests_equal_single_ones", &[NanoLlava], gradients::merged_requests),
    ("gradients::a_parameter_without_gradient_is_an_error", &[NanoLlava], gradients::count_check),
    ("gradients::over_the_wire_equals_in_process", &[NanoLlava], gradients::over_the_wire),
    // Local training.
    ("training::micro_batches_equal_the_batch", &[Nothing], training::micro_batches),
    ("training::fedprox_pulls_to_the_start", &[Nothing], training::prox),
    ("training::clipping_bounds_the_norm", &[Nothing], training::clipping),
    ("training::the_image_adapter_alone", &[Nothing], training::image_only),
    ("training::optimizers_go_on_bit_for_bit", &[Nothing], training::optimizers_go_on),
    ("training::a_mix_is_the_weighted_sum", &[Nothing], training::mixed),
    ("training::own_test_samples_are_never_trained_on", &[Nothing], training::local_test),
    ("training::so_many_steps_as_agreed", &[Nothing], training::local_steps),
    ("training::a_reload_anywhere_changes_nothing", &[Nothing], training::reload),
    ("training::where_nobody_is_known_nothing_goes_on", &[Nothing], training::unknown),
    ("training::late_updates", &[Nothing], training::late),
    ("training::each_strategy_uploads_its_own", &[Nothing], training::strategies),
    ("training::fisher_without_a_pass", &[Nothing], training::fisher_without_a_pass),
    // What goes over the boundary: in whole or in short, in which numbers, once, while something else is done.
    ("boundary::both_modes_train_alike", &[Nothing], boundary::both_modes_train_alike),
    ("boundary::every_format_trains_in_each_direction", &[Nothing], boundary::formats_train),
    ("boundary::deflated_frames_say_the_same", &[Nothing], boundary::deflated_is_the_same),
    ("boundary::numbers_out_of_range_are_refused", &[Nothing], boundary::out_of_range),
    ("boundary::too_small_a_store_asks_again", &[Nothing], boundary::small_store),
    ("boundary::who_comes_back_sends_no_features_again", &[Nothing], boundary::features_once),
    ("boundary::overlap_changes_nothing", &[Nothing], boundary::overlap_changes_nothing),
    ("boundary::stale_steps_train_and_end", &[Nothing], boundary::stale_trains),
    ("boundary::auto_chooses_by_shapes", &[Nothing], boundary::auto_by_shapes),
    ("boundary::only_what_is_offered_is_spoken", &[Nothing], boundary::only_what_is_offered),
    ("boundary::asking_in_every_setting", &[Nothing], boundary::asking_in_every_setting),
    ("boundary::text_goes_as_ids", &[Nothing], boundary::text_goes_as_ids),
    ("boundary::every_form_of_the_token_table_gives_the_same_text", &[Nothing], boundary::every_table_form),
    ("boundary::padding_costs_nothing", &[Nothing], boundary::padding_costs_nothing),
    ("boundary::the_timeline_shows_the_overlap", &[Nothing], boundary::timeline),
    // Every byte, counted at both ends.
    ("ledger::both_ends_and_the_line_agree", &[Nothing], ledger::both_ends_and_the_line_agree),
    ("ledger::askers_and_the_restless_are_counted", &[Nothing], ledger::askers_and_restless),
    ("ledger::who_leaves_is_counted_to_the_end", &[Nothing], ledger::leavers),
    ("ledger::who_is_gone_before_its_welcome_is_counted", &[Nothing], ledger::unwelcomed),
    ("ledger::where_nothing_happens_nothing_is_said", &[Nothing], ledger::quiet),
    ("browser::a_tab_counts_as_the_server_does", &[NanoLlava, Chromium], ledger::tab),
    // The same step elsewhere.
    ("devices::native_wgpu_equals_flex", &[NanoLlava, Vulkan], devices::wgpu_equals_flex),
    ("browser::wasm_flex_equals_native", &[NanoLlava, Chromium], browser::wasm_flex_equals_native),
    ("browser::webgpu_equals_native", &[NanoLlava, Chromium], browser::webgpu_equals_native),
    // Federations.
    ("federation::two_native_clients_learn_over_sockets", &[NanoLlava], federation::two_native_clients),
    ("federation::the_same_seed_gives_the_same_adapters", &[NanoLlava], federation::reproducible),
    ("federation::a_restarted_server_goes_on", &[NanoLlava], federation::restart),
    ("browser::two_tabs_federate", &[NanoLlava, Chromium], browser::two_tabs),
    ("learning::tuning_beats_the_baselines_on_easy_vqa", &[NanoLlava, EasyVqa], learning::easy_vqa_test),
    ("federation::a_restart_with_two_goes_on_with_both", &[NanoLlava], federation::restart_with_two),
    ("federation::a_second_update_is_refused_and_the_first_merged", &[NanoLlava], federation::second_update),
    ("federation::a_huge_update_does_not_destroy_it", &[NanoLlava], federation::huge_update),
    (
        "federation::a_newcomer_during_evaluation_changes_no_saved_round",
        &[NanoLlava],
        federation::newcomer_during_evaluation,
    ),
    ("federation::a_stop_during_evaluation_loses_nothing", &[NanoLlava], federation::stop_during_evaluation),
    ("federation::a_write_that_fails_stops_it_before_anything_is_told", &[NanoLlava], federation::write_that_fails),
    ("federation::a_participation_taken_over_is_told_so", &[NanoLlava], federation::taken_over),
    ("federation::nothing_to_judge_is_an_error", &[NanoLlava], federation::nothing_to_judge),
    ("federation::nothing_to_judge_a_merge_by_loses_no_update", &[NanoLlava], federation::nothing_to_judge_a_merge),
    // A server killed at each of its writes, and started again.
    ("kill::at_every_write_it_goes_on_bit_for_bit", &[Nothing], kill::every_write),
    ("kill::so_does_a_strategy_with_a_memory", &[Nothing], kill::every_write_of_a_strategy_with_memory),
    // Adapters as files, and going on with a data folder.
    ("adapters::what_was_kept_is_exported_and_measured", &[Nothing], adapters::export_and_eval),
    ("adapters::baselines_come_from_training_samples", &[Nothing], adapters::baselines),
    ("adapters::those_of_another_model_are_refused", &[Nothing], adapters::another_model),
    ("adapters::what_cannot_be_exported_is_named", &[Nothing], adapters::export_faults),
    ("adapters::a_resumed_federation_keeps_settings_and_model", &[Nothing], adapters::resume_options),
    // Many participants, and restless ones.
    ("churn::twenty_over_sockets_six_of_them_restless", &[Nothing], churn::twenty_over_sockets),
    ("churn::a_hundred_in_lockstep_are_reproducible", &[Nothing], churn::hundred_in_lockstep),
    // What a person does with the page.
    ("page::own_pictures_and_a_csv", &[NanoLlava, Chromium], page::own_pictures),
    ("page::own_pictures_chosen_again_go_on", &[NanoLlava, Chromium], page::own_pictures_again),
    ("page::faulty_own_pictures_are_named", &[NanoLlava, Chromium], page::faulty_own_pictures),
    ("page::a_question_is_answered_before_and_after", &[NanoLlava, Chromium], page::ask_before_and_after),
    ("page::leaving_and_rejoining_is_one_participant", &[NanoLlava, Chromium], page::leave_and_rejoin),
    ("page::a_reloaded_tab_goes_on", &[NanoLlava, Chromium], page::reload),
    ("page::a_duplicated_tab_is_somebody_new", &[NanoLlava, Chromium], page::duplicated_tab),
    ("page::a_tab_that_was_taken_over_stays_away", &[NanoLlava, Chromium], page::taken_over),
    ("page::fits_a_phone_and_the_keyboard", &[NanoLlava, Chromium], page::phone_and_keyboard),
    // Rules of rounds under random events.
    ("rounds::hold_in_random_sequences", &[Nothing], rounds::random_sequences),
    ("rounds::restarts_change_nothing", &[Nothing], rounds::restarts_change_nothing),
    // Bad input: the cause, the remedy, and nothing lost.
    ("faults::garbage_oversize_and_wrong_version", &[NanoLlava], faults::frames),
    ("faults::messages_out_of_order", &[NanoLlava], faults::out_of_order),
    ("faults::wrong_shapes_and_nan_in_activations", &[NanoLlava], faults::activations),
    ("faults::nan_in_an_update_is_not_merged", &[NanoLlava], faults::nan_update),
    ("faults::unknown_federation", &[NanoLlava], faults::unknown_federation),
    ("faults::a_model_directory_with_missing_or_truncated_files", &[NanoLlava], faults::model_directory),
    ("faults::a_port_in_use", &[Nothing], faults::port_in_use),
    ("faults::the_page_names_what_is_wrong", &[NanoLlava, Chromium], browser::page_errors),
    ("faults::the_page_survives_a_server_restart", &[NanoLlava, Chromium], browser::server_restart),
    // Questions from a terminal.
    ("asking::an_answer_comes_token_by_token", &[NanoLlava], asking::streamed),
    ("asking::adapters_from_a_file_are_used", &[NanoLlava], asking::with_adapters),
    ("asking::the_whole_model_on_this_machine", &[NanoLlava], asking::without_a_server),
    ("asking::what_is_wrong_is_named", &[NanoLlava], asking::faults),
    ("asking::an_interrupted_question_takes_nothing_along", &[NanoLlava], asking::interrupted),
    // Who is still there.
    ("life::a_peer_that_goes_silent_counts_as_away", &[NanoLlava], life::silent),
    ("life::a_quiet_peer_that_answers_stays", &[NanoLlava], life::quiet),
    ("life::a_channel_is_not_watched", &[NanoLlava], life::unwatched),
    ("life::features_that_do_not_come_are_not_waited_for", &[NanoLlava], life::no_pictures),
    ("life::a_silent_server_is_given_up", &[Nothing], life::silent_server),
    // Limits.
    ("limits::split_requests_equal_whole_ones", &[Nothing], limits::split_equals_whole),
    ("limits::a_row_that_is_too_large_is_refused", &[Nothing], limits::too_large_a_row),
    ("limits::names_are_measured_in_bytes", &[NanoLlava], limits::names),
    ("limits::an_own_frame_that_is_too_large_is_not_sent", &[NanoLlava], limits::own_frame),
    // Samples without a picture, samples without a question.
    ("modalities::what_is_missing_leaves_the_prompt", &[Nothing], modalities::prompts),
    ("modalities::rows_with_and_without_picture_share_a_batch", &[Nothing], modalities::mixed_batch),
    ("modalities::without_pictures_the_image_adapter_gets_a_zero_gradient", &[Nothing], modalities::zero_gradient),
    ("modalities::ordinary_text_and_picture_clients_federate", &[Nothing], modalities::federation),
    ("modalities::the_page_takes_and_answers_them", &[NanoLlava, Chromium], modalities::page),
    // Simulations and the study.
    ("experiments::the_same_seed_gives_the_same_adapters", &[Nothing], experiments::same_seed_same_adapters),
    ("experiments::personal_and_centralised_runs", &[Nothing], experiments::personal_and_centralised),
    ("experiments::a_hundred_clients_with_few_samples", &[Nothing], experiments::a_hundred_with_few_samples),
    ("experiments::simulate_takes_a_file", &[Nothing], experiments::simulate_with_a_file),
    ("experiments::the_study_reproduces_and_resumes", &[NanoLlava], experiments::the_study_reproduces_and_resumes),
    // The layout of the code.
    ("architecture::imports_go_downward", &[Nothing], architecture::imports),
    ("architecture::files_stay_short", &[Nothing], architecture::file_lengths),
];

fn main() -> std::process::ExitCode {
    if let Some(ended) = kill::serve_if_asked().or_else(boundary::trace_if_asked) {
        return ended;
    }
    let arguments = Arguments::from_args();
    let trials = INDEX.iter().map(|&(name, needs, test)| {
        let missing: Vec<&str> = needs.iter().filter_map(|n| n.missing()).collect();
        let trial = Trial::test(name, move || test().map_err(|e| Failed::from(format!("{e:#}"))));
        if !missing.is_empty() && !arguments.list {
            eprintln!("NOT RUN {name}: {}", missing.join("; "));
        }
        trial.with_ignored_flag(!missing.is_empty())
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}
