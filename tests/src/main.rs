//! The index of all integration tests. What a machine lacks is reported as ignored, never as passed.

mod architecture;
mod browser;
mod devices;
mod faults;
mod federation;
mod gradients;
mod learning;
mod page;
mod parity;
mod rounds;

use fednano_tests::Needs::{self, Chromium, EasyVqa, NanoLlava, Nothing, Vulkan};
use libtest_mimic::{Arguments, Failed, Trial};

type Test = fn() -> anyhow::Result<()>;

/// Name, what it needs, the test.
const INDEX: &[(&str, &[Needs], Test)] = &[
    // The checkpoint of PyTorch and transformers, down to gradients and Fisher.
    ("parity::vision_and_projector_equal_the_reference", &[Nothing], parity::vision_and_projector),
    ("parity::preprocessing_equals_the_reference_to_one_level", &[Nothing], parity::preprocessing),
    ("parity::loss_and_boundary_gradient_equal_the_reference", &[Nothing], parity::boundary),
    ("parity::adapter_gradients_and_fisher_equal_the_reference", &[Nothing], parity::adapters),
    // The split changes nothing.
    ("gradients::split_equals_whole", &[NanoLlava], gradients::split_equals_whole),
    ("gradients::finite_differences", &[NanoLlava], gradients::finite_differences),
    ("gradients::merged_requests_equal_single_ones", &[NanoLlava], gradients::merged_requests),
    ("gradients::a_parameter_without_gradient_is_an_error", &[NanoLlava], gradients::count_check),
    ("gradients::over_the_wire_equals_in_process", &[NanoLlava], gradients::over_the_wire),
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
    ("federation::a_newcomer_during_evaluation_changes_no_saved_round", &[NanoLlava], federation::newcomer_during_evaluation),
    ("federation::a_stop_during_evaluation_saves_the_round", &[NanoLlava], federation::stop_during_evaluation),
    ("federation::a_participation_taken_over_is_told_so", &[NanoLlava], federation::taken_over),
    ("federation::nothing_to_judge_is_an_error", &[NanoLlava], federation::nothing_to_judge),
    // What a person does with the page.
    ("page::own_pictures_and_a_csv", &[NanoLlava, Chromium], page::own_pictures),
    ("page::faulty_own_pictures_are_named", &[NanoLlava, Chromium], page::faulty_own_pictures),
    ("page::a_question_is_answered_before_and_after", &[NanoLlava, Chromium], page::ask_before_and_after),
    ("page::leaving_and_rejoining_is_one_participant", &[NanoLlava, Chromium], page::leave_and_rejoin),
    ("page::a_reloaded_tab_goes_on", &[NanoLlava, Chromium], page::reload),
    ("page::a_duplicated_tab_is_somebody_new", &[NanoLlava, Chromium], page::duplicated_tab),
    ("page::a_tab_that_was_taken_over_stays_away", &[NanoLlava, Chromium], page::taken_over),
    ("page::fits_a_phone_and_the_keyboard", &[NanoLlava, Chromium], page::phone_and_keyboard),
    // Rules of rounds under random events.
    ("rounds::hold_in_random_sequences", &[Nothing], rounds::random_sequences),
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
    // The layout of the code.
    ("architecture::imports_go_downward", &[Nothing], architecture::imports),
    ("architecture::files_stay_short", &[Nothing], architecture::file_lengths),
];

fn main() -> std::process::ExitCode {
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
