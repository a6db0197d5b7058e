// What --help says beside the list of flags: examples first.
#pragma once

namespace prehoc::cli {

inline constexpr char kProgramHelp[] = R"(Answers questions about long documents from a KV cache in tiers (device, host, disk), reading of it
only what each step needs. Reports what that cost, and how much attention was left out.)";

inline constexpr char kProgramFooter[] = R"(
Examples
  prehoc answer
      ask the default model "Who killed Abel?" with 6,000 tokens of the King James text
  prehoc answer --document notes.txt --question "When is the review?"
      your own document, your own question
  prehoc answer --help
      every flag, with more examples
  prehoc fidelity --html report.html
      what each selector saves and loses on the default model and text, against dense attention
  prehoc inspect --store DIR --verify
      what a disk store holds, and whether every record is what was written
  prehoc torture --seconds 60
      injects faults below the cache and compares every byte that comes back with the truth
  prehoc doctor
      what this machine offers, and what of it will be used)";

inline constexpr char kAnswerFooter[] = R"(
Examples
  prehoc answer --document notes.txt --question "When is the review?"
      reads the whole document, up to 6,000 tokens of it, and answers
  prehoc answer --model smollm2-128k --context 30000 --store /var/tmp/kv
      keeps the KV cache on disk; the second run restores it instead of computing it
  prehoc answer --budget 1/32 --max-dropped-mass 0.05
      1/32 of the positions a step, more for a head whose dropped attention mass may exceed 5 %
  prehoc answer --selector cis --set cis.tau=0.7 --compare dense
      another method, and what it changes against dense attention
  prehoc answer --device-budget 48MiB --host-budget 64MiB --store /var/tmp/kv --json run.json
      tight budgets: KV moves down a tier and is fetched back; all figures in run.json
  prehoc answer --selector cpe --show-knobs
      every knob of a method with its value; change them with --set

Sizes are 64MiB, 1.5GB or plain bytes. Exit code: 0 done, 1 something failed, 2 the command line is
wrong, 130 stopped with Ctrl-C (what is whole has been stored). docs/cli.md has the rest.)";

inline constexpr char kFidelityFooter[] = R"(
Examples
  prehoc fidelity --document notes.txt --html report.html
      dense, window, oracle, cis and tc over the last 128 tokens of the first 8,192
  prehoc fidelity --budgets 1/32,1/16,1/8 --json run.json --html report.html
      three budgets; stopped and started again with the same flags, it goes on where it was
  prehoc fidelity --selectors dense,cis --sweep cis.tau=0.5:0.9:0.1
      one knob after the other, the rest at their defaults
  prehoc fidelity --model smollm2-128k --context 32768 --tasks needle,multikey,multivalue,extract
      facts hidden in the text and asked for; the prompt is computed once and kept on disk

Exit codes as for answer. docs/fidelity.md explains every number and plot.)";

inline constexpr char kInspectFooter[] = R"(
Examples
  prehoc inspect --store /var/tmp/kv
      model, formats, tenants, prompts, bytes and ages; works beside a process that uses the store
  prehoc inspect --store /var/tmp/kv --verify --json report.json
      reads every record and compares it with its checksum; exit code 1 if one is damaged
  prehoc inspect --store /var/tmp/kv --repair
      verifies, and drops what is damaged and what no prompt can reach; each is listed)";

inline constexpr char kTortureFooter[] = R"(
Examples
  prehoc torture --seconds 600 --seed 1
      ten minutes of every kind of fault, in memory and on the disk of temporary files
  prehoc torture --store /mnt/nvme --faults write-torn,read-error,delay
      chosen faults on a chosen disk; a directory is made in it, and removed at the end
  prehoc torture --seed 1 --round 34
      one round again: even rounds repeat to the last bit, odd ones in their work and faults

Exit code: 0 if nothing wrong came back, 1 if one byte did, or the disk cannot be used, 2 the command
line is wrong. docs/reliability.md explains faults and columns.)";

inline constexpr char kDoctorFooter[] = R"(
Examples
  prehoc doctor
      writes and reads 256 MiB beside the cache directory to measure the disk
  prehoc doctor --store /mnt/nvme/kv --test-size 1GiB
      measures the disk that a store would use)";

}  // namespace prehoc::cli
