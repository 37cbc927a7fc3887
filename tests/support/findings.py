"""What the campaign found, which is mended: the test that failed before -> what was wrong."""

from __future__ import annotations

from collections.abc import Mapping

FINDINGS: Mapping[str, str] = {
    "tests/faults/test_every_operation.py::test_a_tool_disturbed_at_any_operation": (
        "a removal, conversion or copy that was killed left what no command could end or clear; "
        "a failed disk was a traceback"
    ),
    "tests/faults/test_removal.py::test_no_reader_is_led_to_what_a_killed_removal_deleted": (
        "readers were led to what a removal that was killed had deleted"
    ),
    "tests/faults/test_every_operation.py::test_a_fit_by_gradient_disturbed_at_any_operation": (
        "a fit by gradient that went on after its last epoch lost the losses that it had logged"
    ),
    "tests/faults/test_every_operation.py::test_a_fit_over_an_old_run_disturbed_at_any_operation": (
        "a place of a run that could not be read ended a fit in a traceback"
    ),
    "tests/faults/test_every_operation.py::test_hdf5_that_finds_no_room": (
        "a full disk crashed a conversion to HDF5"
    ),
    "tests/faults/test_every_operation.py::test_a_checkpoint_that_finds_no_room": (
        "a full disk ended the writing of a checkpoint in a traceback"
    ),
    "tests/faults/test_stop.py::test_a_signal_ends_an_extraction_that_goes_on_later": (
        "SIGTERM and SIGUSR1 ended a command without a word, and its lock was not given back"
    ),
    "tests/faults/test_stop.py::test_a_second_ctrl_c_ends_at_once": (
        "a second Ctrl-C did not end a command at once"
    ),
    "tests/faults/test_redo.py::test_a_process_of_several_that_fails": (
        "a process of --devices that stood still was waited for forever"
    ),
    "tests/faults/test_refusals_before_writing.py::test_units_that_are_no_whole_chunks": (
        "the writer took a block that was no block of its plan, and mixed chunks"
    ),
    "tests/faults/test_fuzz_files.py::test_no_error_has_a_second_line": (
        "an error could have several lines, so that a name in it could forge one"
    ),
    "tests/faults/test_fuzz_files.py::test_an_object_of_hdf5_that_h5py_cannot_open_is_told": (
        "some damage of an HDF5 file ended a conversion in a traceback of h5py"
    ),
    "tests/faults/test_fuzz_files.py::test_options_that_are_no_unicode_are_told": (
        "--label-separator and --template took a lone surrogate, which is no Unicode"
    ),
    "tests/faults/test_fuzz_files.py::test_lists_of_labels_that_are_all_empty_are_told": (
        "lists of labels that were all empty were not refused in a sentence"
    ),
    "tests/faults/test_fuzz_files.py::test_a_few_damaged_files_are_refused_in_a_sentence": (
        "reading the record of a run reserved 1 GiB, however small its file was"
    ),
    "tests/faults/test_long_run.py::test_lost_token_counts_are_counted_again": (
        "an extraction ended in a traceback where only token counts of its cache were lost"
    ),
    "tests/faults/test_long_run.py::test_metadata_of_before_are_no_damage": (
        "verify called a root damaged whose writer was killed before it renewed the metadata "
        "of plain Zarr readers"
    ),
    "tests/faults/test_long_run.py::test_a_folder_of_texts_that_cannot_be_listed_is_named": (
        "a folder of texts that could not be listed ended in a traceback"
    ),
    "tests/faults/test_refusals_before_writing.py::test_places_that_cannot_be": (
        "a place with a NUL was not refused in a sentence"
    ),
    "tests/faults/security/test_output.py::"
    "test_a_file_of_output_replaces_no_device_folder_or_file_of_another": (
        "--output took devices and places inside a cache or a run; as root, /dev/null was replaced "
        "by a file"
    ),
    "tests/faults/security/test_output.py::test_a_folder_of_output_lies_in_no_cache_and_no_run": (
        "a fit, sweep, audit, copy or conversion could write into a cache or a run"
    ),
    "tests/faults/security/test_tokens.py::test_passwords_in_urls_are_not_repeated": (
        "passwords, tokens and signatures in URLs stood in records, messages and tracebacks"
    ),
    "tests/faults/security/test_output.py::test_standard_output_on_a_full_disk": (
        "standard output that could not be written ended a command in a traceback"
    ),
    "tests/faults/security/test_output.py::"
    "test_a_page_that_nobody_named_replaces_no_file_of_another_kind": (
        "a report replaced a file of another kind that had the name of its page"
    ),
    "tests/faults/security/test_places.py::test_links_of_hdf5_are_refused": (
        "an HDF5 file that a conversion refused left a folder, since chunks were written before "
        "all was looked at"
    ),
    "tests/faults/security/test_vulnerabilities.py::test_no_floor_has_a_known_vulnerability": (
        "lowest versions of dependencies had known vulnerabilities, among them jinja2, onnx and "
        "pyarrow"
    ),
    "tests/faults/security/test_vulnerabilities.py::"
    "test_the_audit_fails_on_what_is_known_and_passes_where_nobody_answers": (
        "no command told of known vulnerabilities of the pinned versions"
    ),
    "tests/faults/test_reader.py::test_a_chunk_that_swells_is_refused_within_memory": (
        "a compressed chunk that said it was gigabytes was unpacked until memory ran out"
    ),
    "tests/extract/test_cli.py::test_an_option_that_is_given_twice_is_refused": (
        "of an option given twice the last was taken in silence"
    ),
    "tests/train/test_serving.py::test_a_bad_body_is_refused_in_a_sentence": (
        "the server gave fewer classes where top_k was above their number, and did not say so"
    ),
    "tests/train/test_config.py::test_one_text_or_a_list_stands_for_names": (
        'pooling="mean" in Python was read as letters'
    ),
    "tests/faults/test_load.py::test_what_would_end_the_process_fails_one_request": (
        "sys.exit in a model's code, or a panic in a library, ended the server in a traceback"
    ),
    "tests/faults/test_load.py::test_an_exit_while_the_backbone_loads_is_a_sentence": (
        "sys.exit while a backbone was loaded was not told by the server in a sentence"
    ),
    "tests/faults/test_distributed.py::"
    "test_a_ray_without_a_cpu_is_refused_before_anything_is_written": (
        "an extraction on a Ray without a CPU waited forever without a word"
    ),
    "tests/faults/security/test_network.py::test_ray_shows_nothing_to_the_network": (
        "a Ray that a command started listened on every address of the machine"
    ),
    "tests/faults/test_distributed.py::test_a_driver_that_is_told_to_stop_says_so": (
        "SIGTERM ended a command with a Ray of its own by Ray's way, with exit code 1"
    ),
    "tests/train/test_degenerate.py::test_texts_that_repeat_or_are_alone_in_their_class": (
        "a fit whose texts are the same within each class, or alone in it, ended in a traceback"
    ),
    "tests/train/test_workspace.py::test_a_second_fit_to_the_place_is_refused": (
        "two fits to one place at a time mixed their logs and checkpoints"
    ),
    "tests/faults/test_distributed.py::test_a_ray_of_others_on_this_machine_is_left_alone": (
        "--engine ray ended in a traceback where another Ray ran on the machine"
    ),
    "tests/faults/test_what_people_bring.py::test_a_model_that_cannot_be_trusted_is_refused": (
        "a model that brought code was refused without naming --trust-remote-code, in the words of "
        "transformers"
    ),
    "tests/faults/test_trainer_refuses.py::"
    "test_rows_of_no_weight_teach_nothing_of_several_labels": (
        "of several labels a text, rows of weight 0 had a say in how folds were stratified"
    ),
    "tests/faults/test_trainer_refuses.py::"
    "test_ten_thousand_classes_are_fitted_in_bounded_memory": (
        "with 10,000 classes the held-out scores of all strengths were kept, 8 GB more than of one"
    ),
    "tests/faults/test_fuzz_files.py::test_a_mark_that_is_the_only_label_is_told": (
        "lists of labels that held nothing but the mark of --unlabelled ended in a traceback"
    ),
    "tests/train/test_report.py::test_a_run_of_too_many_classes_has_no_matrix_but_its_errors": (
        "with 10,000 classes the metrics.json of a run was a gigabyte, for its matrix of confusions"
    ),
    "tests/faults/test_long_run.py::test_what_plain_readers_see_of_a_grown_split_is_renewed": (
        "a split that grew and was killed before its root was taken for done, its older list kept "
        "for plain Zarr readers"
    ),
    "tests/extract/test_pipeline.py::test_a_text_that_stands_twice_in_a_block_is_computed_once": (
        "a text in several blocks was taken from the first by one process, not by several: last "
        "bits could differ"
    ),
}
